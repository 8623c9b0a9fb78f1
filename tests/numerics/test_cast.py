"""Casts of kept tensors: what torch rounds to, bit for bit, over every pattern that is near a tie."""

import numpy as np
import pytest
import torch

from fp8pack.numerics.cast import cast

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def patterns(dtype: str) -> np.ndarray:
    """Every pattern of 16 bits; of 32 bits, each upper half with lower halves on both sides of the ties."""
    if dtype != "F32":
        return np.arange(1 << 16, dtype=np.uint16)
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    lower = np.array([0, 1, 0x0FFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    return (upper[:, None] | lower).ravel()


@pytest.mark.parametrize("to", ["BF16", "F16"])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_a_cast_rounds_as_torch_does(dtype: str, to: str) -> None:
    bits = patterns(dtype)
    values = torch.from_numpy(bits).view(TORCH[dtype])
    stored, overflows = cast(bits, dtype, to)
    found, expected = torch.from_numpy(stored).view(TORCH[to]), values.to(TORCH[to])
    is_nan = expected.isnan()
    assert torch.equal(found.isnan(), is_nan)
    assert torch.equal(found[~is_nan].view(torch.int16), expected[~is_nan].view(torch.int16))
    assert overflows == bool((expected.isinf() & values.isfinite()).any())


def test_infinities_are_no_overflow() -> None:
    bits = np.array([np.inf, -np.inf, np.nan, 65504.0], np.float32).view(np.uint32)
    assert not cast(bits, "F32", "F16")[1]
    assert cast(np.array([65520.0], np.float32).view(np.uint32), "F32", "F16")[1]
    assert not cast(bits, "F32", "BF16")[1]
    assert cast(np.array([np.finfo(np.float32).max], np.float32).view(np.uint32), "F32", "BF16")[1]
