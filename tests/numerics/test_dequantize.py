"""FP8 bytes back to floats by the CPU kernel, bit for bit against ml_dtypes and torch; and the tiles of MX scales."""

from typing import Any

import ml_dtypes
import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fp8pack.numerics.formats import FORMATS, Float8Format
from fp8pack.numerics.native import dequantize_rows, largest_codes
from fp8pack.numerics.scaling import decode_e8m0, encode_e8m0
from fp8pack.numerics.swizzle import padded, swizzle, unswizzle
from fp8pack.units import ceil_div

ALL_BYTES = np.arange(256, dtype=np.uint8)
SCALES = (
    *(1.0, 0.75, 1 / 3, 1.0625, 0.0010681152, 448.0, 1e-7, 3.0, 1 / 448, 0.1),
    *(2.0**-127, 2.0**-126, 2.0**-149, 1.5e-41, 1e-38, 2.0**-133, 2.0**100, 2.0**118, 0.0),
)


def dequantize(
    payload: NDArray[np.uint8],
    scales: NDArray[np.float32],
    region: tuple[int, int],
    format: Float8Format,
    bits: Any = np.uint32,
    offset: tuple[int, int] = (0, 0),
) -> tuple[NDArray[Any], float]:
    """The bits that the kernel writes, and the amax that it returns."""
    weight = np.full(payload.shape, 0xAAAA, bits)
    amax = dequantize_rows(payload, scales, weight, region=region, format=format, offset=offset)
    return weight, amax


def expected(payload: NDArray[np.uint8], spread: NDArray[np.float32], format: Float8Format) -> NDArray[np.float32]:
    """The float32 products."""
    element = oracle.ELEMENT[format.name][0]
    with np.errstate(over="ignore", invalid="ignore"):
        return payload.view(element).astype(np.float32) * spread


def finite_bytes(format: Float8Format) -> NDArray[np.uint8]:
    return ALL_BYTES[~np.isin(ALL_BYTES & 0x7F, format.nan_codes)]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
def test_every_finite_byte_times_a_scale_is_the_float32_product_and_its_bf16_rounding(
    format: Float8Format, scale: float
) -> None:
    payload = finite_bytes(format).reshape(1, -1)
    scales = np.array([[scale]], np.float32)
    exact = expected(payload, scales, format)
    found, amax = dequantize(payload, scales, payload.shape, format)
    np.testing.assert_array_equal(found, exact.view(np.uint32))
    assert amax == np.abs(exact).max()
    found, amax = dequantize(payload, scales, payload.shape, format, np.uint16)
    np.testing.assert_array_equal(found, exact.astype(ml_dtypes.bfloat16).view(np.uint16))
    np.testing.assert_array_equal(found, torch.from_numpy(exact).bfloat16().view(torch.uint16).numpy())
    assert amax == np.abs(exact).max()


@pytest.mark.parametrize("code", [0x7C, 0x7D, 0x7E, 0x7F, 0xFC, 0xFF])
@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
def test_one_byte_that_is_no_number_anywhere_makes_amax_nan(format: Float8Format, code: int) -> None:
    for place in (0, 1, 63, 64, 255, 256, 511):
        payload = np.full((4, 128), 0x3C, np.uint8)
        payload.ravel()[place] = code
        _, amax = dequantize(payload, np.ones((1, 1), np.float32), (4, 128), format)
        assert np.isnan(amax) == ((code & 0x7F) in format.nan_codes)


def test_products_that_lie_between_two_bf16_numbers_go_to_even() -> None:
    """1.0 times scales that lie half-way, just below and just above it, with even and odd neighbours."""
    bits = np.array(
        [high << 16 | low for high in (0x3F80, 0x3F81, 0x3FFF, 0x0000, 0x0001, 0x007F, 0x0080, 0x7F7E)
         for low in (0x7FFF, 0x8000, 0x8001, 0x0000, 0xFFFF)],
        np.uint32,
    )  # fmt: skip
    scales = bits.view(np.float32).reshape(-1, 1)
    for code, sign in ((0x38, 0), (0xB8, 0x8000)):
        payload = np.full(scales.shape, code, np.uint8)
        found, _ = dequantize(payload, scales, (1, 1), FORMATS[0], np.uint16)
        even = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        np.testing.assert_array_equal(found.ravel(), even | sign)


@pytest.mark.parametrize("bits", [np.uint16, np.uint32])
@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
@settings(max_examples=80, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 90)),
    region=st.tuples(st.integers(1, 50), st.integers(1, 100)),
    offset=st.tuples(st.integers(0, 49), st.integers(0, 99)),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_region_and_offset_spreads_the_scales_as_repeating_them_does(
    format: Float8Format,
    bits: Any,
    shape: tuple[int, int],
    region: tuple[int, int],
    offset: tuple[int, int],
    seed: int,
) -> None:
    top, left = offset[0] % region[0], offset[1] % region[1]
    whole = (shape[0] + top, shape[1] + left)
    grid = (-(-whole[0] // region[0]), -(-whole[1] // region[1]))
    random = np.random.default_rng(seed)
    payload = random.choice(finite_bytes(format), shape)
    scales = np.exp2(random.uniform(-30, 10, grid)).astype(np.float32)
    spread = oracle.spread(scales, region, whole)[top:, left:]
    exact = expected(payload, spread, format)
    found, amax = dequantize(payload, scales, region, format, bits, (top, left))
    rounded = exact if bits is np.uint32 else exact.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(found, rounded.view(bits))
    assert amax == np.abs(exact).max()


@settings(max_examples=60, deadline=None)
@given(
    scale=st.floats(2.0**-140, 2.0**100, width=32, allow_subnormal=True),
    format=st.sampled_from(FORMATS),
)
def test_any_scale_gives_what_torch_gives(scale: float, format: Float8Format) -> None:
    payload = np.ascontiguousarray(finite_bytes(format).reshape(2, -1))
    scales = np.array([[scale]], np.float32)
    element = torch.float8_e4m3fn if format.name == "e4m3" else torch.float8_e5m2
    exact = torch.from_numpy(payload).view(element).float() * torch.from_numpy(scales)
    found, _ = dequantize(payload, scales, payload.shape, format)
    np.testing.assert_array_equal(found, exact.view(torch.uint32).numpy())
    found, _ = dequantize(payload, scales, payload.shape, format, np.uint16)
    np.testing.assert_array_equal(found, exact.bfloat16().view(torch.uint16).numpy())


def test_a_product_beyond_float32_is_no_finite_amax() -> None:
    """The sentence of the kernel: amax is NaN where what comes out is no number that a weight may hold."""
    payload = np.array([[0x7E, 0x00]], np.uint8)
    _, amax = dequantize(payload, np.full((1, 1), 3e38, np.float32), (1, 2), FORMATS[0])
    assert not np.isfinite(amax)


# Exponents and their tiles.


def test_exponents_are_read_as_ml_dtypes_reads_them() -> None:
    reference = ALL_BYTES.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    np.testing.assert_array_equal(decode_e8m0(ALL_BYTES), reference)
    np.testing.assert_array_equal(encode_e8m0(decode_e8m0(ALL_BYTES[:255])), ALL_BYTES[:255])


def offset_of(r: int, c: int, cols: int) -> int:
    """NVIDIA's formula, for a grid padded to `cols` columns."""
    return ((r // 128) * (cols // 4) + c // 4) * 512 + (r % 32) * 16 + (r % 128) // 32 * 4 + c % 4


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 400), cols=st.integers(1, 21), seed=st.integers(0, 2**32 - 1))
def test_tiles_lie_where_the_formula_says_and_come_back(rows: int, cols: int, seed: int) -> None:
    grid = np.random.default_rng(seed).integers(1, 255, (rows, cols), np.uint8)
    tiles = swizzle(grid)
    assert tiles.shape == padded((rows, cols)) == (-(-rows // 128) * 128, -(-cols // 4) * 4)
    flat = tiles.ravel()
    for r in {0, rows // 2, rows - 1}:
        for c in range(cols):
            assert flat[offset_of(r, c, tiles.shape[1])] == grid[r, c]
    assert np.count_nonzero(flat) == grid.size, "what pads is zero"
    np.testing.assert_array_equal(unswizzle(tiles, (rows, cols)), grid)


def test_tiles_are_those_of_torchs_own_description() -> None:
    grid = np.random.default_rng(0).integers(0, 256, (256, 12), np.uint8)
    blocked = torch.from_numpy(grid).view(2, 4, 32, 3, 4).transpose(1, 3).contiguous().flatten()
    np.testing.assert_array_equal(swizzle(grid).ravel(), blocked.numpy())


@given(
    shape=st.tuples(st.integers(1, 70), st.integers(1, 90)),
    region=st.tuples(st.integers(1, 80), st.integers(1, 100)),
    corner=st.tuples(st.integers(0, 79), st.integers(0, 99)),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_largest_code_of_each_region_is_that_of_the_region_in_numpy(
    shape: tuple[int, int], region: tuple[int, int], corner: tuple[int, int], seed: int
) -> None:
    payload = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    offset = corner[0] % region[0], corner[1] % region[1]
    grid = ceil_div(shape[0] + offset[0], region[0]), ceil_div(shape[1] + offset[1], region[1])
    padded = np.zeros((grid[0] * region[0], grid[1] * region[1]), np.uint8)
    padded[offset[0] : offset[0] + shape[0], offset[1] : offset[1] + shape[1]] = payload & 0x7F
    expected = padded.reshape(grid[0], region[0], grid[1], region[1]).max((1, 3))
    found = largest_codes(payload, grid, region=region, offset=offset)
    np.testing.assert_array_equal(found, expected)
