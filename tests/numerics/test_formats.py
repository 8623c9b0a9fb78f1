import ml_dtypes
import numpy as np
import pytest

from fp8pack.errors import RecipeError
from fp8pack.numerics.formats import E4M3, E5M2, FORMATS, Float8Format, parse_format
from fp8pack.numerics.value_table import value_table

ELEMENT = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
def test_facts_are_those_of_ml_dtypes(format: Float8Format) -> None:
    info = ml_dtypes.finfo(ELEMENT[format.name])
    assert float(info.max) == format.max
    assert info.nmant == format.mantissa_bits
    assert float(info.smallest_normal) == 2.0 ** (1 - format.bias)
    assert np.frexp(format.max)[1] - 1 == format.emax


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
def test_every_byte_has_the_value_that_ml_dtypes_gives_it(format: Float8Format) -> None:
    expected = np.arange(256, dtype=np.uint8).view(ELEMENT[format.name]).astype(np.float32)
    np.testing.assert_array_equal(value_table(format), expected)


@pytest.mark.parametrize("text", ["e4m3", "E4M3", "fp8_e4m3", "float8_e4m3fn", "FP8-E4M3"])
def test_names_of_the_field_are_understood(text: str) -> None:
    assert parse_format(text) is E4M3


def test_e5m2_is_understood_and_anything_else_is_refused() -> None:
    assert parse_format("float8_e5m2") is E5M2
    with pytest.raises(RecipeError, match="format 'e4m3fnuz' is not known"):
        parse_format("e4m3fnuz")
