"""FP4 and integers: every code against ml_dtypes, every region against NumPy, every rounding against a cast."""

from itertools import product

import ml_dtypes
import numpy as np
import oracle
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

from fp8pack.numerics.formats import E2M1, INT4, INT8, SIGNED_INT8, TABLE_FORMATS, TableFormat
from fp8pack.numerics.table_codec import as_e4m3, dequantize_codes, split_nibbles, split_words
from fp8pack.numerics.value_table import value_table

BF16 = ml_dtypes.bfloat16
FORMATS = (*TABLE_FORMATS, SIGNED_INT8)


def test_every_code_has_its_value() -> None:
    nibbles, octets = np.arange(16, dtype=np.uint8), np.arange(256, dtype=np.uint8)
    expected = nibbles.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert value_table(E2M1).tobytes() == expected.tobytes()  # the sign of zero, too
    np.testing.assert_array_equal(value_table(INT4), nibbles.astype(np.float32) - 8)
    np.testing.assert_array_equal(value_table(INT8), octets.astype(np.float32) - 128)
    np.testing.assert_array_equal(value_table(SIGNED_INT8), octets.view(np.int8).astype(np.float32))


@pytest.mark.parametrize("format", [E2M1, INT4], ids=lambda format: format.name)
def test_e4m3_has_every_value_of_four_bits(format: TableFormat) -> None:
    found = as_e4m3(np.arange(16, dtype=np.uint8).reshape(4, 4), format)
    assert found.view(ml_dtypes.float8_e4m3fn).astype(np.float32).tobytes() == value_table(format).tobytes()


def test_the_lower_nibble_comes_first() -> None:
    packed = np.arange(256, dtype=np.uint8)
    expected = [nibble for byte in range(256) for nibble in (byte % 16, byte // 16)]
    assert split_nibbles(packed).tolist() == expected
    assert split_nibbles(packed[:0]).size == 0


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 8, 45])
def test_words_are_split_as_compressed_tensors_packs_them(bits: int, rows: int) -> None:
    half = 1 << bits - 1
    codes = np.random.default_rng(0).integers(-half, half, (rows, 3)).astype(np.int8)
    words = pack_to_int32(torch.from_numpy(codes), bits, packed_dim=0).numpy().view(np.uint32)
    np.testing.assert_array_equal(split_words(words, bits)[:rows].astype(np.int16) - half, codes)


@pytest.mark.parametrize("with_zero_points", [False, True])
@pytest.mark.parametrize("format", FORMATS, ids=lambda format: f"{format.name}, {format.values[0]}")
@pytest.mark.parametrize(
    ("region", "offset"), [((1, 32), (0, 0)), ((32, 1), (5, 0)), ((7, 5), (3, 4)), ((99, 99), (0, 0))]
)
def test_values_are_products_rounded_once(
    region: tuple[int, int], offset: tuple[int, int], format: TableFormat, with_zero_points: bool
) -> None:
    random, shape = np.random.default_rng(1), (37, 64)
    codes = random.integers(0, 1 << format.bits, shape).astype(np.uint8)
    whole = (shape[0] + offset[0], shape[1] + offset[1])
    grid = tuple(-(-side // step) for side, step in zip(whole, region, strict=True))
    scales = np.exp(random.normal(0, 5, grid)).astype(np.float32)
    zero_points = random.integers(-8, 8, grid).astype(np.float32) if with_zero_points else None
    spread = [
        oracle.spread(each, region, whole)[offset[0] :, offset[1] :] if each is not None else np.float32(0)
        for each in (scales, zero_points)
    ]
    expected = (np.array(format.values, np.float32)[codes] - spread[1]) * spread[0]
    for dtype, bits in ((np.float32, np.uint32), (BF16, np.uint16)):
        found = np.empty(shape, bits)
        amax = dequantize_codes(
            codes, scales, found, format=format, region=region, offset=offset, zero_points=zero_points
        )
        assert amax == np.abs(expected).max()
        np.testing.assert_array_equal(found, expected.astype(dtype).view(bits))


def test_the_smallest_and_largest_exponents_are_exact() -> None:
    """2^-127 is subnormal in float32; 6 * 2^125 is the largest FP4 value that BF16 holds of a scale of 2^125."""
    codes = np.arange(16, dtype=np.uint8)[None]
    for exponent, bits in product((-127, -126, 0, 125), (np.uint32, np.uint16)):
        found = np.empty((1, 16), bits)
        scale = np.array([[2.0**exponent]], np.float32)
        dequantize_codes(codes, scale, found, format=E2M1, region=(1, 16))
        exact = np.array(E2M1.values) * 2.0**exponent
        values = found.view(np.float32 if bits is np.uint32 else BF16).astype(np.float64)
        np.testing.assert_array_equal(values[0], exact)


def test_nothing_has_an_amax_of_zero() -> None:
    empty = np.empty((0, 16), np.uint8)
    scales = np.ones((0, 1), np.float32)
    assert dequantize_codes(empty, scales, empty.astype(np.uint32), format=INT4, region=(1, 16)) == 0
