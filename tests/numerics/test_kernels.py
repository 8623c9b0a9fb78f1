"""The CPU kernels, bit for bit against an oracle that shares no code with them."""

from typing import Any

import ml_dtypes
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fp8pack.numerics.formats import E4M3, FORMATS, Float8Format
from fp8pack.numerics.granularity import parse_granularity
from fp8pack.numerics.metrics import dequantized, energies, widen
from fp8pack.numerics.native import amax_rows, dequantize_rows, largest_codes, quantize_rows
from fp8pack.numerics.rounding import ScaleRounding
from fp8pack.numerics.scaling import decode_e8m0, encode_e8m0, scale_of
from fp8pack.numerics.value_table import value_table

NUMPY_DTYPE: dict[str, Any] = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}
GRANULARITIES = ("tensor", "channel", "group:64", "group:7", "block:128x128", "block:3x5", "mx")
SHAPES = ((1, 1), (1, 33), (7, 1), (128, 128), (129, 127), (5, 300), (256, 384))


def bits_of(weight: NDArray[Any]) -> NDArray[Any]:
    return weight.view(f"u{weight.dtype.itemsize}")


def run(weight: NDArray[Any], dtype: str, format: Float8Format, granularity: str, rounding: ScaleRounding) -> Any:
    shape = (weight.shape[0], weight.shape[1])
    described = parse_granularity(granularity)
    payload, scales = np.empty(shape, np.uint8), np.empty(described.scale_shape(shape), np.float32)
    region = described.region(shape)
    amax = quantize_rows(bits_of(weight), payload, scales, dtype=dtype, region=region, format=format, rounding=rounding)
    return payload, scales, amax


@pytest.mark.parametrize("rounding", list(ScaleRounding))
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("dtype", NUMPY_DTYPE)
def test_bytes_and_scales_equal_the_oracle(
    dtype: str, format: Float8Format, granularity: str, rounding: ScaleRounding
) -> None:
    for seed, shape in enumerate(SHAPES):
        rng = np.random.default_rng(seed)
        spread = np.exp2(rng.integers(-12, 4, shape)).astype(np.float32)
        weight = (rng.standard_normal(shape, dtype=np.float32) * spread).astype(NUMPY_DTYPE[dtype])
        payload, scales, amax = run(weight, dtype, format, granularity, rounding)
        expected = oracle.quantize(weight.astype(np.float32), format.name, granularity, rounding.value)
        np.testing.assert_array_equal(scales, expected[1])
        np.testing.assert_array_equal(payload, expected[0])
        assert amax == np.abs(weight.astype(np.float32)).max()


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_finite_16_bit_pattern_is_rounded_as_ml_dtypes_rounds_it(dtype: str, format: Float8Format) -> None:
    """With a scale of 1, and with scales whose mantissa makes quotients fall near ties."""
    patterns = np.arange(65536, dtype=np.uint16)
    values = patterns.view(NUMPY_DTYPE[dtype])
    values = values[np.isfinite(values.astype(np.float32))]
    weight = values.reshape(-1, 256 if dtype == "BF16" else 64)
    element, largest, _ = oracle.ELEMENT[format.name]
    for scale in (1.0, 0.75, 1.0625, 1 / 3, 2.0**-100):
        payload, scales = np.empty(weight.shape, np.uint8), np.full((1, 1), scale, np.float32)
        quantize_rows(bits_of(weight), payload, scales, dtype=dtype, region=weight.shape, format=format, rounding=None)
        with np.errstate(over="ignore"):
            quotient = weight.astype(np.float32) / scales[0, 0]
        np.testing.assert_array_equal(payload, np.clip(quotient, -largest, largest).astype(element).view(np.uint8))


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
def test_midpoints_go_to_even_and_their_neighbours_to_the_nearer_side(format: Float8Format) -> None:
    table = value_table(format)
    grid = table[np.isfinite(table) & (table >= 0) & (np.arange(256) < 128)]
    middles = ((grid[:-1].astype(np.float64) + grid[1:]) / 2).astype(np.float32)
    points = np.concatenate([middles, np.nextafter(middles, np.float32(0)), np.nextafter(middles, np.float32(np.inf))])
    weight = np.concatenate([points, -points]).reshape(1, -1)
    payload, scales = np.empty(weight.shape, np.uint8), np.ones((1, 1), np.float32)
    quantize_rows(bits_of(weight), payload, scales, dtype="F32", region=weight.shape, format=format, rounding=None)
    np.testing.assert_array_equal(payload, weight.astype(oracle.ELEMENT[format.name][0]).view(np.uint8))


@settings(max_examples=200, deadline=None)
@given(
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=80),
    format=st.sampled_from(FORMATS),
    granularity=st.sampled_from(GRANULARITIES),
    rounding=st.sampled_from(ScaleRounding),
)
def test_any_finite_float32_row_equals_the_oracle(
    values: list[float], format: Float8Format, granularity: str, rounding: ScaleRounding
) -> None:
    weight = np.array([values], np.float32)
    payload, scales, _ = run(weight, "F32", format, granularity, rounding)
    expected = oracle.quantize(weight, format.name, granularity, rounding.value)
    np.testing.assert_array_equal(scales, expected[1])
    np.testing.assert_array_equal(payload, expected[0])


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("dtype", NUMPY_DTYPE)
def test_no_byte_is_a_nan_or_an_infinity_and_minus_zero_stays(dtype: str, format: Float8Format) -> None:
    largest = float(ml_dtypes.finfo(NUMPY_DTYPE[dtype]).max)
    weight = np.array([[largest, -largest, 0.0, -0.0, 1e-7, -1e-7] * 8], np.float32).astype(NUMPY_DTYPE[dtype])
    for granularity in GRANULARITIES:
        for rounding in ScaleRounding:
            payload, scales, _ = run(weight, dtype, format, granularity, rounding)
            assert np.isfinite(value_table(format)[payload]).all()
            assert (np.isfinite(scales) & (scales > 0)).all()
            assert (payload[0, 3::6] == 0x80).all()


def test_a_region_of_zeros_has_scale_one() -> None:
    weight = np.zeros((4, 64), ml_dtypes.bfloat16)
    weight[3, 40] = 1.0
    payload, scales, _ = run(weight, "BF16", FORMATS[0], "mx", ScaleRounding.UP)
    assert scales[:3].tolist() == [[1.0, 1.0]] * 3
    assert scales[3, 0] == 1.0
    assert not payload[:3].any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", NUMPY_DTYPE)
def test_a_nan_or_infinity_anywhere_is_reported(dtype: str, bad: float) -> None:
    weight = np.ones((130, 70), NUMPY_DTYPE[dtype])
    weight[129, 69] = bad
    for granularity in GRANULARITIES:
        assert np.isnan(run(weight, dtype, FORMATS[0], granularity, ScaleRounding.NONE)[2])
    assert np.isnan(amax_rows(bits_of(weight), dtype=dtype))


def test_scales_of_a_whole_tensor_follow_the_same_formula() -> None:
    for format in FORMATS:
        element, largest, emax = oracle.ELEMENT[format.name]
        for amax in (0.0, 1e-42, 1.0, 3.4e38, 448.0, 447.9, 57344.0, 0.1):
            for rounding in ScaleRounding:
                expected = oracle.scale(np.float32(amax), largest, emax, rounding.value)
                assert scale_of(amax, format, rounding) == expected, (element, amax, rounding)


@pytest.mark.parametrize("dtype", NUMPY_DTYPE)
def test_error_energy_measures_what_dequantizing_gives_back(dtype: str) -> None:
    weight = np.random.default_rng(1).standard_normal((40, 200), dtype=np.float32).astype(NUMPY_DTYPE[dtype])
    payload, scales, _ = run(weight, dtype, FORMATS[0], "group:64", ScaleRounding.NONE)
    region, format = (1, 64), FORMATS[0]
    rounded = dequantized(payload, scales, region=region, format=format)
    signal, noise = energies(widen(bits_of(weight), dtype), rounded)
    exact = weight.astype(np.float64)
    restored = value_table(format)[payload].astype(np.float64) * oracle.spread(scales, region, (40, 200))
    assert signal == pytest.approx((exact**2).sum(), rel=1e-9)
    assert noise == pytest.approx(((exact - restored) ** 2).sum(), rel=1e-5)


def test_e8m0_bytes_are_exponents() -> None:
    exponents = np.arange(255, dtype=np.uint8)
    expected = exponents.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    np.testing.assert_array_equal(decode_e8m0(exponents), expected)
    np.testing.assert_array_equal(encode_e8m0(expected[1:]), exponents[1:])
    assert np.isnan(decode_e8m0(np.array([255], np.uint8)))[0]


def read_only(array: NDArray[Any]) -> NDArray[Any]:
    array.flags.writeable = False
    return array


WEIGHT, PAYLOAD, SCALES = np.zeros((6, 8), np.uint16), np.zeros((6, 8), np.uint8), np.ones((3, 2), np.float32)
WRONG: dict[str, tuple[Any, Any, Any]] = {
    "gaps in the weight": (np.zeros((6, 16), np.uint16)[:, ::2], PAYLOAD, SCALES),
    "a transposed payload": (WEIGHT, np.zeros((8, 6), np.uint8).T, SCALES),
    "a weight of another width": (WEIGHT.astype(np.uint32), PAYLOAD, SCALES),
    "a weight of another byte order": (WEIGHT.astype(">u2"), PAYLOAD, SCALES),
    "a payload of signed bytes": (WEIGHT, PAYLOAD.astype(np.int8), SCALES),
    "scales of doubles": (WEIGHT, PAYLOAD, SCALES.astype(np.float64)),
    "a small payload": (WEIGHT, PAYLOAD[:5], SCALES),
    "too few scales": (WEIGHT, PAYLOAD, SCALES[:2].copy()),
    "a payload that is read-only": (WEIGHT, read_only(PAYLOAD.copy()), SCALES),
    "scales that are read-only": (WEIGHT, PAYLOAD, read_only(SCALES.copy())),
}


@pytest.mark.parametrize("arrays", WRONG.values(), ids=WRONG.keys())
def test_no_kernel_is_given_what_it_would_read_or_write_beyond(arrays: tuple[Any, Any, Any]) -> None:
    """C knows neither strides nor dtypes."""
    with pytest.raises(ValueError, match="a kernel takes"):
        quantize_rows(*arrays, dtype="BF16", region=(2, 4), format=E4M3, rounding=ScaleRounding.NONE)


def test_the_other_kernels_refuse_the_same() -> None:
    with pytest.raises(ValueError, match="with gaps"):
        amax_rows(np.zeros((6, 16), np.uint16)[:, ::2], dtype="BF16")
    with pytest.raises(ValueError, match=r"writable; .* read-only"):
        dequantize_rows(PAYLOAD, SCALES, read_only(WEIGHT.copy()), region=(2, 4), format=E4M3)
    with pytest.raises(ValueError, match="do not hold 6 x 8 from 1, 0 on"):
        dequantize_rows(PAYLOAD, SCALES, WEIGHT.copy(), region=(2, 4), format=E4M3, offset=(1, 0))
    with pytest.raises(ValueError, match="do not hold"):
        largest_codes(PAYLOAD, (3, 1), region=(2, 4))


def test_what_is_only_read_may_be_read_only() -> None:
    arrays = (read_only(WEIGHT.copy()), PAYLOAD.copy(), read_only(SCALES.copy()))
    assert quantize_rows(*arrays, dtype="BF16", region=(2, 4), format=E4M3, rounding=None) == 0
    assert dequantize_rows(read_only(PAYLOAD.copy()), arrays[2], WEIGHT.copy(), region=(2, 4), format=E4M3) == 0
