"""Floats in fewer bits: what `unpack` and `--kept-dtype` round to."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fp8pack.numerics.metrics import widen

OVERFLOW = {"F16": 65520.0, "BF16": (2 - 2**-8) * 2.0**127, "F32": math.inf}  # what rounds to infinity, and beyond
_PIECE = 1 << 14  # elements at a time: larger temporaries would be mapped anew each time
_MAGNITUDE, _INFINITY = np.uint32(0x7FFFFFFF), np.uint32(0x7F800000)  # of float32
_QUIET_NAN = {"F16": np.uint16(0x7E00), "BF16": np.uint16(0x7FC0)}


def narrow(values: NDArray[np.float32], dtype: str) -> NDArray[np.uint16]:
    """Return float32 values as raw bits of BF16 or F16, rounded once to nearest even.

    A finite value from OVERFLOW on becomes an infinity. A NaN becomes the quiet NaN of its sign; torch makes of its
    payload what the processor makes of it.
    """
    bits = values.view(np.uint32)
    if dtype == "F16":
        with np.errstate(over="ignore", invalid="ignore"):
            narrowed = values.astype(np.float16).view(np.uint16)
    else:
        rounded = bits >> 16
        rounded &= 1
        rounded += 0x7FFF
        rounded += bits
        rounded >>= 16
        narrowed = rounded.astype(np.uint16)
    if (is_nan := (bits & _MAGNITUDE) > _INFINITY).any():
        narrowed[is_nan] = (bits[is_nan] >> 16 & 0x8000).astype(np.uint16) | _QUIET_NAN[dtype]
    return narrowed


def cast(bits: NDArray[Any], dtype: str, to: str) -> NDArray[np.uint16] | None:
    """Return raw bits [n] of BF16, F16 or F32 as those of BF16 or F16, None if a finite value is out of range."""
    narrowed, limit = np.empty(bits.shape, np.uint16), np.float32(OVERFLOW[to]).view(np.uint32)
    for lo in range(0, bits.size, _PIECE):
        piece = bits[lo : lo + _PIECE]
        values = piece.view(np.float32) if dtype == "F32" else widen(piece, dtype)
        magnitudes = values.view(np.uint32) & _MAGNITUDE
        if magnitudes.max() >= limit and ((magnitudes >= limit) & (magnitudes < _INFINITY)).any():
            return None
        narrowed[lo : lo + _PIECE] = narrow(values, to)
    return narrowed
