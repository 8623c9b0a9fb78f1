"""Floats in another float dtype: each value rounded once, to nearest, ties to even."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fp8pack.numerics.metrics import widen

_QUIET = np.uint32(0x00400000)


def cast(bits: NDArray[Any], dtype: str, to: str) -> tuple[NDArray[np.uint16], bool]:
    """Return values as raw bits of another dtype, and whether one of them became infinite.

    Shapes: bits [n], of dtype BF16, F16 or F32; the result [n], of BF16 or F16. Infinities and NaN stay what they are.
    """
    values = widen(bits, dtype)
    if to == "F16":
        with np.errstate(over="ignore", invalid="ignore"):
            halves = values.astype(np.float16)
        return halves.view(np.uint16), bool((np.isinf(halves) & np.isfinite(values)).any())
    wide = values.view(np.uint32)
    rounded = ((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16).astype(np.uint16)
    is_nan = np.isnan(values)
    rounded[is_nan] = ((wide[is_nan] | _QUIET) >> 16).astype(np.uint16)
    infinite = (rounded & 0x7FFF) == 0x7F80
    return rounded, bool((infinite & np.isfinite(values)).any())
