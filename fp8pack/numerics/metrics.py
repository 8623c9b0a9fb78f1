"""How much of a weight survives quantization."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fp8pack.numerics import native
from fp8pack.numerics.formats import E4M3, Float8Format, Format
from fp8pack.numerics.value_table import value_table

_FLOAT_DTYPE = {"F16": np.float16, "F32": np.float32}


def dequantized(
    payload: NDArray[np.uint8], scales: NDArray[np.float32], *, region: tuple[int, int], format: Float8Format
) -> NDArray[np.float32]:
    """Return payload [N, K] * scales [ceil(N/R), ceil(K/C)] in float32, where region = (R, C)."""
    (n, k), (rows, cols) = payload.shape, region
    return value_table(format)[payload] * np.repeat(np.repeat(scales, rows, axis=0)[:n], cols, axis=1)[:, :k]


def energies(exact: NDArray[np.float32], approximate: NDArray[np.float32]) -> tuple[float, float]:
    """Return signal and noise: the energy of values and of their difference from others, in float64."""
    error = exact - approximate
    signal, noise = (values.astype(np.float64).ravel() for values in (exact, error))
    return float(signal @ signal), float(noise @ noise)


@dataclass(frozen=True, slots=True)
class WeightError:
    """A quantized weight against its source, over all elements; None where a NaN or infinity is among them.

    num_nonfinite: elements that are a NaN or infinity, here or in the source. relative_mean, relative_max: of
    |error| / |value|, where the value is not zero. cosine: of the two as vectors. flushed: share of elements that
    became zero; subnormal: that became subnormal FP8 numbers; saturated: that were clipped to the largest FP8 number;
    the last two are None for FP4 and integers. outlier_ratio: amax over the root mean square of the source.
    """

    num_nonfinite: int
    relative_mean: float | None = None
    relative_max: float | None = None
    cosine: float | None = None
    flushed: float | None = None
    subnormal: float | None = None
    saturated: float | None = None
    outlier_ratio: float | None = None


class ErrorTally:
    """Adds up how far a weight is from its source, strip by strip, in one pass of a kernel."""

    def __init__(self, format: Format, dtype: str) -> None:
        """`dtype`: of the source: BF16, F16 or F32."""
        self._format, self._dtype = format, dtype
        self._size, self._sums, self._counts = 0, np.zeros(6), np.zeros(5, np.int64)

    def add(self, exact: NDArray[Any], approximate: NDArray[np.float32], codes: NDArray[np.uint8]) -> None:
        """Count elements of the source, raw bits, with the same elements of the weight and the codes behind them."""
        is_float8 = isinstance(self._format, Float8Format)
        format = self._format if isinstance(self._format, Float8Format) else E4M3
        native.compare_rows(
            *(exact, approximate, codes if is_float8 else None, self._sums, self._counts),
            dtype=self._dtype,
            format=format,
        )
        self._size += exact.size

    @property
    def sqnr(self) -> float | None:
        """In dB, None where a NaN or infinity is among the values."""
        return None if self._counts[1] else sqnr_db(float(self._sums[0]), float(self._sums[2]))

    @property
    def error(self) -> WeightError:
        """All other metrics."""
        signal, energy, noise, relative, worst, peak = map(float, self._sums)
        nonzero, nonfinite, flushed, subnormal, saturated = map(int, self._counts)
        if nonfinite or not self._size:
            return WeightError(nonfinite)
        norms, rms = math.sqrt(signal) * math.sqrt(energy), math.sqrt(signal / self._size)
        is_float8 = isinstance(self._format, Float8Format)
        return WeightError(
            num_nonfinite=0,
            relative_mean=relative / nonzero if nonzero else 0.0,
            relative_max=worst,
            cosine=(signal + energy - noise) / 2 / norms if norms else float(signal == energy),
            flushed=flushed / self._size,
            subnormal=subnormal / self._size if is_float8 else None,
            saturated=saturated / self._size if is_float8 else None,
            outlier_ratio=peak / rms if rms else None,
        )


class OutputTally:
    """Adds up what a linear's output loses, from the mean square of each input channel, as if they were independent.

    Signal: sum over channels k of m_k |w_k|^2, with the column w_k of the weight; noise: the same of its error, and of
    the rounding of inputs, r^2 m_k |q_k|^2, where r^2 is the relative energy of that rounding. docs/numerics.md derives
    it, and says how far it holds.
    """

    def __init__(self, mean_squares: NDArray[np.float64], rounding: float = 0.0) -> None:
        """`mean_squares` [K]; `rounding`: r^2, 0 if inputs are not quantized."""
        self._mean_squares, self._rounding = mean_squares, rounding
        self._signal = self._noise = 0.0

    def add(self, exact: NDArray[np.float32], approximate: NDArray[np.float32]) -> None:
        """Count rows [n, K] of the source and of the weight."""
        self._signal += float(_by_column(exact) @ self._mean_squares)
        self._noise += float(_by_column(exact - approximate) @ self._mean_squares)
        if self._rounding:
            self._noise += self._rounding * float(_by_column(approximate) @ self._mean_squares)

    @property
    def sqnr(self) -> float | None:
        """In dB, None where a NaN or infinity is among the values."""
        return sqnr_db(self._signal, self._noise) if math.isfinite(self._signal + self._noise) else None


def _by_column(values: NDArray[np.float32]) -> NDArray[np.float64]:
    return np.asarray(np.square(values).sum(0, dtype=np.float64))


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
