"""Quantizing activations: one fused Triton kernel on NVIDIA GPUs, torch elsewhere; the same bytes from both."""

from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from fp8pack.gemm.layouts import tile
from fp8pack.numerics import torch_codec
from fp8pack.numerics.formats import E4M3
from fp8pack.numerics.granularity import MX, TENSOR, Granularity
from fp8pack.numerics.rounding import ScaleRounding


def quantize_activation(
    x: Tensor, granularity: Granularity, *, padded: tuple[int, int], scale: Tensor | None = None, tiled: bool = False
) -> tuple[Tensor, Tensor]:
    """Return activations as E4M3, and the scales that dequantize them.

    Shapes: x [M, K] bfloat16, float16 or float32; payload [M', K'] = padded, zeros beyond M and K. Scales, float32: [1]
        for `tensor`, [M', 1] for `channel` (a token each), [M', ceil(K'/G)] in columns for `group:G`, as cuBLASLt reads
        them; for `mx` exponents, uint8 [M', ceil(K'/32)], or in the tiles of numerics/swizzle.py if `tiled`.
    Numerics: as `torch_codec.quantize`; MX scales are rounded up to powers of two. scale: a static one, float32, one
        element; values beyond its range saturate. A NaN or infinity in x makes all values that share its scale NaN;
        with a static scale only itself.
    """
    kernels = _triton() if x.is_cuda and torch.version.hip is None else None
    if kernels is not None:
        region = granularity if scale is None else TENSOR
        found: tuple[Tensor, Tensor] = kernels.quantize(x, region, padded=padded, scale=scale, tiled=tiled)
        return found
    return quantize_in_torch(x, granularity, padded=padded, scale=scale, tiled=tiled)


def quantize_in_torch(
    x: Tensor, granularity: Granularity, *, padded: tuple[int, int], scale: Tensor | None = None, tiled: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the same as `quantize_activation`, in several passes; the reference for the kernel."""
    wide = torch.nn.functional.pad(x, (0, padded[1] - x.shape[1], 0, padded[0] - x.shape[0]))
    if scale is not None or granularity == TENSOR:
        static = None if scale is None else scale.float().reshape(1, 1)
        payload, used = torch_codec.quantize_unchecked(wide, padded, format=E4M3, scales=static)
        return payload, used.reshape(1)
    rounding = ScaleRounding.UP if granularity == MX else ScaleRounding.NONE
    payload, used = torch_codec.quantize_unchecked(wide, granularity.region(padded), format=E4M3, rounding=rounding)
    if granularity == MX:
        exponents = (used.view(torch.int32) >> 23).to(torch.uint8)
        return payload, tile(exponents) if tiled else exponents
    return payload, used if used.shape[1] == 1 else used.t().contiguous().t()


def float_scale_of(scale: Tensor) -> Tensor:
    """Return scales as float32: floats unchanged, exponents (uint8) as powers of two."""
    return scale.view(torch.float8_e8m0fnu).float() if scale.dtype == torch.uint8 else scale


@cache
def _triton() -> ModuleType | None:
    """Our Triton kernels, None if Triton is not installed; only NVIDIA GPUs run them."""
    try:
        return import_module("fp8pack.gemm.triton_activations")
    except ImportError:
        return None
