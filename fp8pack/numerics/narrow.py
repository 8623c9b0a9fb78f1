"""Floats in fewer bits: what `unpack` and `--kept-dtype` round to."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fp8pack.numerics.metrics import widen

OVERFLOW = {"F16": 65520.0, "BF16": (2 - 2**-8) * 2.0**127, "F32": math.inf}  # what rounds to infinity, and beyond
_QUIET_NAN = {"F16": np.uint16(0x7E00), "BF16": np.uint16(0x7FC0)}


def narrow(values: NDArray[np.float32], dtype: str) -> NDArray[np.uint16]:
    """Return float32 values as raw bits of BF16 or F16, rounded once to nearest even.

    A finite value from OVERFLOW on becomes an infinity. A NaN becomes the quiet NaN of its sign; torch makes of its
    payload what the processor makes of it.
    """
    bits = values.view(np.uint32)
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype == "F16":
            narrowed = values.astype(np.float16).view(np.uint16)
        else:
            narrowed = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
        is_nan = np.isnan(values)
    if is_nan.any():
        narrowed[is_nan] = (bits[is_nan] >> 16 & 0x8000).astype(np.uint16) | _QUIET_NAN[dtype]
    return narrowed


def cast(bits: NDArray[Any], dtype: str, to: str) -> NDArray[np.uint16] | None:
    """Return raw bits of one dtype (BF16, F16, F32) as those of BF16 or F16, None if a finite value is out of range."""
    values = widen(bits, dtype)
    magnitudes = values.view(np.uint32) & 0x7FFFFFFF
    limit = int(np.float32(OVERFLOW[to]).view(np.uint32))
    return None if ((magnitudes >= limit) & (magnitudes < 0x7F800000)).any() else narrow(values, to)
