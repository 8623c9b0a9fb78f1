"""How much of a weight survives quantization."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fp8pack.numerics.formats import Float8Format
from fp8pack.numerics.value_table import value_table

_FLOAT_DTYPE = {"F16": np.float16, "F32": np.float32}


def error_energy(
    weight: NDArray[Any],
    payload: NDArray[np.uint8],
    scales: NDArray[np.float32],
    *,
    dtype: str,
    region: tuple[int, int],
    format: Float8Format,
) -> tuple[float, float]:
    """Return signal and noise: the energy of a weight, and of what quantizing took away from it, in float64.

    Shapes: weight [N, K], the raw bits of `dtype` (BF16, F16, F32); payload [N, K]; scales [ceil(N/R), ceil(K/C)],
        where region = (R, C). Values are exact in float32; their difference is rounded to float32 once.
    """
    n, k = weight.shape
    rows, cols = region
    spread = np.repeat(np.repeat(scales, rows, axis=0)[:n], cols, axis=1)[:, :k]
    return energies(widen(weight, dtype), value_table(format)[payload] * spread)


def energies(exact: NDArray[np.float32], approximate: NDArray[np.float32]) -> tuple[float, float]:
    """Return signal and noise: the energy of values and of their difference from others, in float64."""
    error = exact - approximate
    signal, noise = (values.astype(np.float64).ravel() for values in (exact, error))
    return float(signal @ signal), float(noise @ noise)


def widen(weight: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Return raw bits of `dtype` (BF16, F16, F32) as float32 values."""
    if dtype == "BF16":
        return (weight.astype(np.uint32) << 16).view(np.float32)
    return weight.view(_FLOAT_DTYPE[dtype]).astype(np.float32)


LOST_DB, EXACT_DB = -1000.0, 1000.0  # of values that have nothing to do with each other, and of equal ones


def sqnr_db(signal: float, noise: float) -> float:
    """Return the signal-to-quantization-noise ratio 10 log10(signal / noise) in dB, from LOST_DB to EXACT_DB.

    E4M3 weights are near 31.5 dB, E5M2 near 25.7 dB: three and two mantissa bits, 6.02 dB a bit. EXACT_DB: nothing is
    lost. LOST_DB: nothing is left, as where a NaN or infinity is among the values.
    """
    if noise == 0:
        return EXACT_DB
    if not signal > 0 or not math.isfinite(signal) or not math.isfinite(noise):
        return LOST_DB
    return max(LOST_DB, min(EXACT_DB, 10 * math.log10(signal / noise)))
