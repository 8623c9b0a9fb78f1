"""Compensated rounding, byte for byte against GPTQ in NumPy (tests/gptq.py)."""

import itertools
import re
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from gptq import gptq, spread_scales
from numpy.typing import NDArray

from fp8pack.numerics.compensation import Feedback, compensate, feedback_of, output_energy
from fp8pack.numerics.compensation_kernels import compile_compensation, compile_moments
from fp8pack.numerics.formats import E4M3, FORMATS, Float8Format
from fp8pack.numerics.granularity import parse_granularity
from fp8pack.numerics.native import add_moments, compensate_rows, factor, quantize_rows
from fp8pack.numerics.rounding import ScaleRounding

Array = NDArray[Any]
GRANULARITIES = ("tensor", "channel", "group:64", "block:128x128", "mx")
SIZES = (128, 1000)  # of a block of moments: diagonal blocks, and the whole


def make_inputs(tokens: int, channels: int, seed: int = 0) -> Array:
    """Return BF16 activations [T, K] whose channels are correlated, some larger than others."""
    rng = np.random.default_rng(seed)
    strength = (1 + np.arange(channels)) ** -0.5  # few directions hold most of the energy, as in a model
    mixed = rng.standard_normal((tokens, channels)) * strength @ rng.standard_normal((channels, channels))
    return (mixed * np.exp2(rng.integers(-3, 3, channels))).astype(ml_dtypes.bfloat16)


def moments_of(inputs: Array, size: int) -> Array:
    """Return second moments [B, S, S] as the kernel adds them."""
    tokens, channels = inputs.shape
    moments = np.zeros((-(-channels // size), size, size))
    add_moments(inputs.view(np.uint16), np.zeros(tokens, np.int32), moments)
    return moments


def quantize(weight: Array, dtype: str, format: Float8Format, granularity: str) -> tuple[Array, Array]:
    """Return payload and scales of rounding to nearest."""
    bits, described = weight.view(f"u{weight.dtype.itemsize}"), parse_granularity(granularity)
    payload, scales = np.empty(bits.shape, np.uint8), np.empty(described.scale_shape(bits.shape), np.float32)
    region = described.region(bits.shape)
    quantize_rows(bits, payload, scales, dtype=dtype, region=region, format=format, rounding=ScaleRounding.NONE)
    return payload, scales


def round_compensated(
    weight: Array, scales: Array, feedback: Feedback, *, dtype: str, format: Float8Format, granularity: str
) -> Array:
    """Return the payload of compensated rounding."""
    bits = weight.view(f"u{weight.dtype.itemsize}")
    payload, region = np.empty(bits.shape, np.uint8), parse_granularity(granularity).region(bits.shape)
    compensate(bits, payload, scales, feedback, dtype=dtype, region=region, format=format)
    return payload


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
def test_bytes_equal_gptq(format: Float8Format, granularity: str, size: int) -> None:
    inputs = make_inputs(700, 320)
    size = min(size, inputs.shape[1])
    feedback = feedback_of(moments_of(inputs, size))
    for dtype, kind in (("BF16", ml_dtypes.bfloat16), ("F32", np.float32)):
        weight = np.random.default_rng(1).standard_normal((130, 320)).astype(kind)
        _, scales = quantize(weight, dtype, format, granularity)
        found = round_compensated(weight, scales, feedback, dtype=dtype, format=format, granularity=granularity)
        spread = spread_scales(scales, parse_granularity(granularity).region(weight.shape), weight.shape)
        exact = inputs.astype(np.float64)
        np.testing.assert_array_equal(found, gptq(weight, exact.T @ exact, spread, format.name, size))


@pytest.mark.parametrize("size", SIZES)
def test_outputs_are_closer_than_with_rounding_to_nearest(size: int) -> None:
    inputs = make_inputs(2000, 256)
    weight = np.random.default_rng(2).standard_normal((96, 256)).astype(ml_dtypes.bfloat16)
    nearest, scales = quantize(weight, "BF16", E4M3, "channel")
    feedback = feedback_of(moments_of(inputs, min(size, 256)))
    found = round_compensated(weight, scales, feedback, dtype="BF16", format=E4M3, granularity="channel")

    def noise(codes: Array) -> float:
        error = weight.astype(np.float64) - codes.view(ml_dtypes.float8_e4m3fn).astype(np.float64) * scales
        return float(np.square(inputs.astype(np.float64) @ error.T).sum())

    assert noise(found) < 0.5 * noise(nearest)


def test_moments_are_x_transposed_x_and_leave_padding_out() -> None:
    inputs = make_inputs(333, 200)
    prompts = np.where(np.arange(333) % 5 == 0, -1, 3).astype(np.int32)
    moments = np.zeros((2, 128, 128))
    add_moments(inputs.view(np.uint16), prompts, moments)
    x = inputs[prompts >= 0].astype(np.float64)
    np.testing.assert_allclose(np.triu(moments[0]), np.triu((x.T @ x)[:128, :128]), rtol=1e-12, atol=1e-10)
    np.testing.assert_allclose(np.triu(moments[1, :72, :72]), np.triu((x.T @ x)[128:, 128:]), rtol=1e-12, atol=1e-10)
    assert not moments[1, 72:].any() and not moments[1, :, 72:].any()


def test_moments_of_parts_in_order_are_those_of_the_whole_bit_for_bit() -> None:
    inputs, none = make_inputs(300, 160), np.zeros(300, np.int32)
    whole, parts = np.zeros((1, 160, 160)), np.zeros((1, 160, 160))
    add_moments(inputs.view(np.uint16), none, whole)
    for begin, end in ((0, 7), (7, 135), (135, 300)):
        add_moments(np.ascontiguousarray(inputs[begin:end]).view(np.uint16), none[begin:end], parts)
    np.testing.assert_array_equal(np.triu(whole), np.triu(parts))


@pytest.mark.parametrize("size", [1, 63, 64, 65, 200])
def test_the_factor_is_upper_triangular_and_multiplies_to_the_matrix(size: int) -> None:
    x = np.random.default_rng(0).standard_normal((2 * size, size))
    exact = x.T @ x
    matrix = exact.copy()
    assert factor(matrix)
    root = np.triu(matrix)
    np.testing.assert_allclose(root @ root.T, exact, rtol=1e-11, atol=1e-11 * float(np.abs(exact).max()))
    assert not factor(np.zeros((size, size)))


def test_the_bytes_of_a_row_do_not_depend_on_the_rows_beside_it() -> None:
    feedback = feedback_of(moments_of(make_inputs(500, 192), 192))
    weight = np.random.default_rng(3).standard_normal((150, 192)).astype(ml_dtypes.bfloat16)
    _, scales = quantize(weight, "BF16", E4M3, "channel")
    together = round_compensated(weight, scales, feedback, dtype="BF16", format=E4M3, granularity="channel")
    for begin, end in ((0, 1), (1, 70), (70, 150)):
        part = np.ascontiguousarray(weight[begin:end])
        alone = round_compensated(part, scales[begin:end], feedback, dtype="BF16", format=E4M3, granularity="channel")
        np.testing.assert_array_equal(alone, together[begin:end])


def test_without_tokens_rounding_is_to_nearest_and_dead_channels_do_no_harm() -> None:
    weight = np.random.default_rng(4).standard_normal((9, 96)).astype(ml_dtypes.bfloat16)
    nearest, scales = quantize(weight, "BF16", E4M3, "channel")
    none = feedback_of(np.zeros((1, 96, 96)))
    found = round_compensated(weight, scales, none, dtype="BF16", format=E4M3, granularity="channel")
    np.testing.assert_array_equal(found, nearest)
    inputs = make_inputs(5, 96)  # fewer tokens than channels
    inputs[:, ::3] = 0
    found = round_compensated(
        weight, scales, feedback_of(moments_of(inputs, 96)), dtype="BF16", format=E4M3, granularity="channel"
    )
    np.testing.assert_array_equal(found[:, ::3], nearest[:, ::3])
    assert not np.isin(found & 0x7F, E4M3.nan_codes).any()


def test_no_product_is_fused_with_a_sum_and_no_sum_is_reordered() -> None:
    """What would let two processors give other bytes does not stand in the kernels."""
    for ir in (compile_moments(), compile_compensation("uint16"), compile_compensation("uint32")):
        assert re.search(r"\bfadd\b", ir)
        assert not re.search(r"llvm\.fm|\b(fast|contract|reassoc)\b", ir)


def test_arrays_that_do_not_belong_together_are_refused() -> None:
    weight, payload, scales = np.zeros((2, 96), np.uint16), np.zeros((2, 96), np.uint8), np.ones((2, 1), np.float32)
    for gains, order, problem in (
        (np.zeros((2, 96, 96)), np.arange(96)[None].repeat(2, 0), "blocks"),
        (np.zeros((1, 96, 96)), np.arange(1, 97)[None], "permutation"),
        (np.zeros((1, 96, 96)), np.zeros((1, 96), np.int64), "permutation"),
        (np.zeros((1, 96, 96)), np.arange(95)[None], "permutation"),
    ):
        with pytest.raises(ValueError, match=problem):
            compensate_rows(weight, payload, scales, gains, order, dtype="BF16", region=(1, 96), format=E4M3)
    with pytest.raises(ValueError, match="blocks"):
        add_moments(weight, np.zeros(2, np.int32), np.zeros((1, 64, 64)))


@pytest.mark.parametrize("size", [128, 200])
def test_the_energy_of_outputs_is_that_of_the_inputs_times_the_rows(size: int) -> None:
    inputs, rows = make_inputs(300, 200), np.random.default_rng(6).standard_normal((5, 200)).astype(np.float32)
    found = output_energy(rows, feedback_of(moments_of(inputs, size)))
    parts = [slice(0, size), slice(size, 200)]
    expected = sum(np.square(inputs[:, part].astype(np.float64) @ rows[:, part].T).sum() for part in parts)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_rows_of_moments_can_be_added_to_by_several_threads() -> None:
    inputs, none = make_inputs(150, 320), np.zeros(150, np.int32)
    for size in (128, 320):
        whole, parts = moments_of(inputs, size), np.zeros((-(-320 // size), size, size))
        bounds = [0, 7, 64, 200, parts.shape[0] * size]
        for begin, end in itertools.pairwise(bounds):
            add_moments(inputs.view(np.uint16), none, parts, (begin, end))
        np.testing.assert_array_equal(np.triu(whole), np.triu(parts))
