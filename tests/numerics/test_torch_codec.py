"""The torch reference gives the bytes of the CPU kernels."""

import numpy as np
import oracle
import pytest
import torch

from fp8pack.numerics import torch_codec
from fp8pack.numerics.formats import FORMATS, Float8Format
from fp8pack.numerics.granularity import parse_granularity
from fp8pack.numerics.native import quantize_rows
from fp8pack.numerics.rounding import ScaleRounding


@pytest.mark.parametrize("rounding", list(ScaleRounding))
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group:64", "block:128x128", "block:3x5", "mx"])
@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_torch_and_the_kernels_write_the_same_bytes(
    dtype: str, format: Float8Format, granularity: str, rounding: ScaleRounding
) -> None:
    torch.manual_seed(0)
    torch_dtype = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[dtype]
    weight = (torch.randn(131, 260) * torch.exp2(torch.randint(-20, 4, (131, 260)))).to(torch_dtype)
    weight[:, 64:128] = 0
    region = parse_granularity(granularity).region((131, 260))
    payload, scales = torch_codec.quantize(weight, region, format=format, rounding=rounding)
    bits = weight.view(torch.int32 if dtype == "F32" else torch.int16).numpy().view("u4" if dtype == "F32" else "u2")
    expected = np.empty((131, 260), np.uint8)
    expected_scales = np.empty(scales.shape, np.float32)
    quantize_rows(bits, expected, expected_scales, dtype=dtype, region=region, format=format, rounding=rounding)
    np.testing.assert_array_equal(scales.numpy(), expected_scales)
    np.testing.assert_array_equal(payload.view(torch.uint8).numpy(), expected)


def test_bytes_do_not_depend_on_what_a_cast_does_beyond_the_range() -> None:
    """Scales of the floor rule leave values above the range; a bare cast gave NaN before torch 2.12."""
    weight = torch.tensor([[1.99, 1.0, -1.99, 0.5]])
    payload, scales = torch_codec.quantize(weight, (1, 4), format=FORMATS[0], rounding=ScaleRounding.FLOOR)
    assert scales.item() == 2.0**-8
    assert payload.view(torch.uint8).tolist() == [[0x7E, 0x78, 0xFE, 0x70]]


def test_dequantize_is_payload_times_scale_in_float32() -> None:
    weight = torch.randn(70, 100)
    payload, scales = torch_codec.quantize(weight, (16, 32), format=FORMATS[0])
    restored = torch_codec.dequantize(payload, scales, (16, 32))
    factors = torch.from_numpy(oracle.spread(scales.numpy(), (16, 32), (70, 100)))
    assert torch.equal(restored, payload.float() * factors)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_an_error(bad: float) -> None:
    with pytest.raises(ValueError, match="NaN or infinity"):
        torch_codec.quantize(torch.tensor([[1.0, bad]]), (1, 2), format=FORMATS[0])


def test_a_region_larger_than_the_weight_is_the_weight() -> None:
    weight = torch.randn(3, 50)
    payload, scales = torch_codec.quantize(weight, (4096, 64), format=FORMATS[0])
    whole, scale = torch_codec.quantize(weight, (3, 50), format=FORMATS[0])
    assert torch.equal(payload.view(torch.uint8), whole.view(torch.uint8))
    assert torch.equal(scales, scale)
    assert torch_codec.dequantize(payload, scales, (4096, 64)).shape == (3, 50)
