"""The search for scales: errors of every candidate against NumPy, and the scale that it takes."""

from typing import Any

import ml_dtypes
import numpy as np
import oracle
import pytest
from numpy.typing import NDArray

from fp8pack.numerics.formats import FORMATS, Float8Format
from fp8pack.numerics.granularity import parse_granularity
from fp8pack.numerics.native import add_scale_errors, quantize_rows
from fp8pack.numerics.rounding import ScaleRounding
from fp8pack.numerics.scaling import CANDIDATES, better_scales

Array = NDArray[Any]


def test_candidates_are_an_octave_in_equal_steps() -> None:
    np.testing.assert_allclose(CANDIDATES, 2.0 ** (np.arange(16) / 16), rtol=1e-7)
    assert CANDIDATES[0] == 1
    assert CANDIDATES.dtype == np.float32


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group:64", "block:128x128"])
@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
def test_errors_are_those_of_rounding_with_each_candidate(format: Float8Format, granularity: str, dtype: str) -> None:
    kind: Any = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}[dtype]
    weight = np.random.default_rng(0).standard_normal((130, 200)).astype(kind)
    bits, described = weight.view(f"u{weight.dtype.itemsize}"), parse_granularity(granularity)
    region, scales = described.region(weight.shape), np.empty(described.scale_shape(weight.shape), np.float32)
    payload = np.empty(weight.shape, np.uint8)
    quantize_rows(bits, payload, scales, dtype=dtype, region=region, format=format, rounding=ScaleRounding.NONE)
    errors = np.zeros((*scales.shape, CANDIDATES.size))
    add_scale_errors(bits, scales, errors, factors=CANDIDATES, dtype=dtype, region=region, format=format)
    element, largest, _ = oracle.ELEMENT[format.name]
    exact = weight.astype(np.float32)
    for i, factor in enumerate(CANDIDATES):
        spread = (scales * factor).repeat(region[0], 0).repeat(region[1], 1)[:130, :200]
        rounded = np.clip(exact / spread, -largest, largest).astype(element).astype(np.float32) * spread
        square = np.square((exact - rounded).astype(np.float64))
        rows = np.add.reduceat(square, np.arange(0, 130, region[0]), 0)
        expected = np.add.reduceat(rows, np.arange(0, 200, region[1]), 1)
        np.testing.assert_allclose(errors[..., i], expected, rtol=1e-12)
    better = better_scales(scales, errors)
    np.testing.assert_array_equal(better, scales * CANDIDATES[errors.argmin(-1)])
    assert (better != scales).any() or granularity == "tensor"


def test_of_equal_candidates_the_smallest_is_taken() -> None:
    scales, errors = np.full((1, 2), 3, np.float32), np.zeros((1, 2, 16))
    errors[0, 1, :5] = 1
    np.testing.assert_array_equal(better_scales(scales, errors), [[3, np.float32(3) * CANDIDATES[5]]])
