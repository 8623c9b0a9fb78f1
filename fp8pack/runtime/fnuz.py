"""E4M3 FNUZ, the E4M3 of AMD's gfx942: the same bits have half the value, and 0x80 is a NaN instead of minus zero."""

import torch
from torch import Tensor

from fp8pack.errors import InputError
from fp8pack.modelfacts.contents import Contents
from fp8pack.numerics.formats import E4M3
from fp8pack.numerics.torch_codec import as_fnuz
from fp8pack.runtime.memory import Buffers

_STEP = 64 << 20
_NAN = 0x7F


def turn_into_fnuz(memory: Buffers, contents: Contents) -> None:
    """Convert the payloads of all E4M3 weights in place, into bytes whose E4M3 FNUZ values are half as large.

    Raises:
        InputError: one contains a NaN, which would become a number.
    """
    for spec in contents.tensors:
        quantized = contents.quantized.get(spec.name)
        if quantized is None or quantized.format != E4M3:
            continue
        if _turn(memory.tensor(spec).view(torch.uint8).view(-1)):
            raise InputError(
                f"{spec.file}: {spec.name!r} contains a NaN, which E4M3 FNUZ does not have in the same bytes",
                "use --device cpu",
            )


def _turn(payload: Tensor) -> bool:
    """Convert minus zeros to zeros in place; return whether a byte is a NaN."""
    found = torch.zeros((), dtype=torch.bool, device=payload.device)
    for step in torch.split(payload, _STEP):
        found |= ((step & _NAN) == _NAN).any()
        as_fnuz(step)
    return bool(found)


def double(scale: Tensor) -> Tensor:
    """Return doubled scales, exactly: floats, or exponents of powers of two (uint8, float8_e8m0fnu).

    Raises:
        InputError: one is too large to be doubled.
    """
    if scale.dtype in (torch.uint8, torch.float8_e8m0fnu):
        exponents = scale.view(torch.uint8)
        if (exponents >= 254).any():
            raise InputError("a scale of 2^127 cannot be doubled")
        return (exponents + 1).view(scale.dtype)
    return scale * 2
