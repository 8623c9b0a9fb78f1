"""The metrics of a quantized weight, against NumPy in float64 and against theory."""

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from fp8pack.numerics.formats import E4M3, E5M2, INT8, Float8Format
from fp8pack.numerics.metrics import LOST_DB, ErrorTally
from fp8pack.numerics.value_table import value_table

DTYPES = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}
FP8 = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}
BITS = {2: np.uint16, 4: np.uint32}


def weight(dtype: str, shape: tuple[int, int] = (37, 129)) -> NDArray[Any]:
    """A weight with zeros, values that become zero or subnormal, and some that are clipped by a scale of 1 / 64."""
    rng = np.random.default_rng(7)
    values = rng.standard_normal(shape) * 10.0 ** rng.uniform(-6, 0.5, shape)
    values[0, :40] = 0.0
    return values.astype(DTYPES[dtype])


def quantized(
    values: NDArray[Any], format: Float8Format, scale: float
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """A weight rounded to a format under one scale, clipped: its values and its codes."""
    clipped = np.clip(values.astype(np.float32) / np.float32(scale), -format.max, format.max)
    codes = clipped.astype(FP8[format.name]).view(np.uint8)
    return value_table(format)[codes] * np.float32(scale), codes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", [E4M3, E5M2], ids=str)
def test_metrics_are_those_of_numpy_in_float64(dtype: str, format: Float8Format) -> None:
    exact = weight(dtype)
    scale = float(np.abs(exact.astype(np.float32)).max()) / format.max / 1.25  # clips the largest
    found, codes = quantized(exact, format, scale)
    tally = ErrorTally(format, dtype)
    for lo in range(0, 37, 10):  # strips, none of them a multiple of what the kernel takes at a time
        bits = exact[lo : lo + 10].view(BITS[exact.itemsize])
        tally.add(bits, found[lo : lo + 10].copy(), codes[lo : lo + 10].copy())
    x, q = exact.astype(np.float64), found.astype(np.float64)
    error = (exact.astype(np.float32) - found).astype(np.float64)
    relative = np.abs(error[x != 0]) / np.abs(x[x != 0])
    magnitudes, size = codes & 0x7F, x.size
    assert tally.sqnr == pytest.approx(10 * math.log10((x**2).sum() / (error**2).sum()), rel=1e-12)
    result = tally.error
    assert result.num_nonfinite == 0
    assert result.cosine == pytest.approx((x * q).sum() / np.sqrt((x**2).sum() * (q**2).sum()), rel=1e-9)
    assert result.relative_mean == pytest.approx(relative.mean(), rel=1e-6)
    assert result.relative_max == pytest.approx(relative.max(), rel=1e-6)
    assert result.flushed == np.count_nonzero((x != 0) & (q == 0)) / size
    assert result.subnormal == np.count_nonzero((magnitudes > 0) & (magnitudes < 1 << format.mantissa_bits)) / size
    assert format is E5M2 or min(result.flushed, result.subnormal) > 0  # E5M2 reaches further down than these values
    top = format.nan_codes[0] - 1
    assert result.saturated == np.count_nonzero((magnitudes == top) & (np.abs(x) > np.abs(q) * (1 + 2**-8))) / size
    assert result.saturated > 0
    assert result.outlier_ratio == pytest.approx(np.abs(x).max() / np.sqrt((x**2).mean()), rel=1e-12)


def test_the_largest_value_of_a_region_is_not_clipped() -> None:
    exact = weight("BF16")
    found, codes = quantized(exact, E4M3, float(np.abs(exact.astype(np.float32)).max()) / E4M3.max)
    tally = ErrorTally(E4M3, "BF16")
    tally.add(exact.view(np.uint16), found, codes)
    assert tally.error.saturated == 0


@pytest.mark.parametrize("where", ["the weight", "the source"])
def test_a_nan_is_counted_and_never_averaged(where: str) -> None:
    exact = weight("F32")
    found, codes = quantized(exact, E4M3, 0.01)
    (found if where == "the weight" else exact)[3, 5:7] = np.nan, np.inf
    tally = ErrorTally(E4M3, "F32")
    tally.add(exact.view(np.uint32), found, codes)
    assert (tally.sqnr, tally.error.num_nonfinite, tally.error.cosine, tally.error.flushed) == (None, 2, None, None)


def test_zeros_against_zeros_and_against_values() -> None:
    zeros, ones = np.zeros((4, 8), np.float32), np.ones((4, 8), np.float32)
    same, lost = ErrorTally(E4M3, "F32"), ErrorTally(INT8, "F32")
    same.add(zeros.view(np.uint32), zeros, zeros.astype(np.uint8))
    lost.add(zeros.view(np.uint32), ones, zeros.astype(np.uint8))
    assert (same.error.cosine, same.error.relative_mean, same.error.outlier_ratio) == (1.0, 0.0, None)
    assert (lost.sqnr, lost.error.cosine, lost.error.saturated) == (LOST_DB, 0.0, None)


@pytest.mark.parametrize("format", [E4M3, E5M2], ids=str)
def test_the_sqnr_of_gaussian_weights_is_that_of_theory(format: Float8Format) -> None:
    """The noise is the integral of (x - Q(x))^2 under a Gaussian, for the scale that the weight has."""
    exact = np.random.default_rng(0).standard_normal((1000, 1000)).astype(np.float32)
    scale = float(np.abs(exact).max()) / format.max
    tally = ErrorTally(format, "F32")
    tally.add(exact.view(np.uint32), *quantized(exact, format, scale))
    x = np.linspace(-6, 6, 2_000_001)
    density = np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi) * (x[1] - x[0])
    noise = float(((x - quantized(x.reshape(1, -1), format, scale)[0][0]) ** 2) @ density)
    assert tally.sqnr == pytest.approx(10 * math.log10(1 / noise), abs=0.1)
