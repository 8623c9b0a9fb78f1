"""The Triton kernels: the bytes of the reference codec, and GEMMs as exact as their accumulation in float32.

On a machine without a GPU they run in Triton's interpreter (conftest.py), on CPU tensors.
"""

import pytest
import torch
from torch import Tensor

from fp8pack.gemm.triton_activations import quantize
from fp8pack.gemm.triton_gemm import dequantize_gemm, scaled_gemm, serves
from fp8pack.numerics import swizzle, torch_codec
from fp8pack.numerics.formats import E4M3, E5M2, Float8Format
from fp8pack.numerics.granularity import CHANNEL, MX, TENSOR, Granularity, parse_granularity
from fp8pack.numerics.rounding import ScaleRounding
from fp8pack.numerics.scaling import encode_e8m0
from fp8pack.numerics.value_table import value_table

pytestmark = pytest.mark.slow

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GRANULARITIES = [TENSOR, CHANNEL, parse_granularity("group:128"), parse_granularity("group:32"), MX]
SHAPES = [(1, 1), (3, 130), (17, 257), (33, 384)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]

# The interpreter is numpy, which warns where a GPU goes on.
in_numpy = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


def by_reference(x: Tensor, granularity: Granularity, padded: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The payload and scales of the reference codec, for x padded with zeros."""
    rounding = ScaleRounding.UP if granularity == MX else ScaleRounding.NONE
    whole = torch.zeros(padded, dtype=x.dtype, device=x.device)
    whole[: x.shape[0], : x.shape[1]] = x
    return torch_codec.quantize(whole, granularity.region(padded), format=E4M3, rounding=rounding)


def assert_same_bytes(x: Tensor, granularity: Granularity, padded: tuple[int, int] | None = None) -> None:
    """The kernels and the reference codec quantize x to the same payload and scales."""
    size = (x.shape[0], x.shape[1]) if padded is None else padded
    payload, scales = quantize(x, granularity, padded=size)
    expected, expected_scales = by_reference(x, granularity, size)
    assert torch.equal(payload.view(torch.uint8), expected.view(torch.uint8))
    if granularity == MX:
        assert scales.cpu().numpy().tolist() == encode_e8m0(expected_scales.cpu().numpy()).tolist()
    else:
        assert torch.equal(scales, expected_scales.reshape(scales.shape))


def awkward(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Values over many binades, with a row of zeros, negative zeros, and a row of subnormals."""
    torch.manual_seed(shape[1])
    x = (torch.randn(shape) * torch.exp2(torch.randint(-12, 9, shape))).to(dtype)
    x[shape[0] // 2] = 0
    x[:, ::7] *= -0.0
    x[-1] = torch.randn(shape[1]) * torch.finfo(dtype).tiny / 4
    return x.to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_the_bytes_are_those_of_the_reference(
    granularity: Granularity, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    assert_same_bytes(awkward(shape, dtype), granularity)
    assert_same_bytes(awkward(shape, dtype), granularity, (shape[0] + 7, shape[1] + 15 & ~15))


@pytest.mark.parametrize("granularity", GRANULARITIES[1:], ids=str)
def test_every_finite_bfloat16(granularity: Granularity) -> None:
    patterns = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    finite = patterns[torch.isfinite(patterns)]
    mixed = finite[torch.randperm(len(finite), generator=torch.Generator().manual_seed(0))]
    for values in (finite, mixed):
        assert_same_bytes(values.view(255, 256).to(DEVICE), granularity)


def test_every_tie_goes_to_the_even_code() -> None:
    values = torch.from_numpy(value_table(E4M3)[:127])
    ties = (values[:-1] + values[1:]) / 2
    row = torch.cat([ties, torch.nextafter(ties, values[1:]), torch.nextafter(ties, values[:-1]), values])
    assert_same_bytes(torch.stack([row, -row]).to(DEVICE), CHANNEL)  # the largest, 448, makes the scale 1


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("largest", [3.4e38, 2.0**-120, 1e-44])
def test_the_ends_of_float32(granularity: Granularity, largest: float) -> None:
    assert_same_bytes((torch.linspace(-1, 1, 3 * 130) * largest).view(3, 130).to(DEVICE), granularity)


def test_an_exponent_is_that_of_the_next_power_of_two() -> None:
    exact = 448 * torch.exp2(torch.arange(-20, 20))
    infinity = torch.tensor(torch.inf)
    amax = torch.cat([torch.nextafter(exact, -infinity), exact, torch.nextafter(exact, infinity)])
    assert_same_bytes((amax[:, None] * torch.linspace(-1, 1, 32)).to(DEVICE), MX)


def test_rows_that_no_block_holds() -> None:
    x = torch.randn(2, 33000, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16).to(DEVICE)
    x[1, -1] = 100
    assert_same_bytes(x, CHANNEL, (3, 33008))


@in_numpy
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_given_scale_saturates(dtype: torch.dtype) -> None:
    x, scale = awkward((17, 257), dtype), torch.tensor([0.37], device=DEVICE)
    payload, returned = quantize(x, TENSOR, padded=(24, 272), scale=scale)
    whole = torch.nn.functional.pad(x, (0, 15, 0, 7))
    expected, _ = torch_codec.quantize(whole, (24, 272), format=E4M3, scales=scale.view(1, 1))
    assert torch.equal(payload.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(returned, scale)


@in_numpy
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_what_is_not_finite_spoils_its_region_and_no_other(granularity: Granularity, bad: float) -> None:
    x = torch.randn(5, 257, device=DEVICE, dtype=torch.bfloat16)
    x[2, 40] = bad
    payload, scales = quantize(x, granularity, padded=(8, 272))
    rows, cols = granularity.region((5, 257))
    spoilt = torch.zeros(8, 272, dtype=torch.bool, device=DEVICE)
    spoilt[2 // rows * rows :][:rows, 40 // cols * cols :][:, :cols] = True
    spoilt[5:], spoilt[:, 257:] = False, False
    assert torch.equal(payload.float().isnan(), spoilt)
    if granularity == MX:
        assert (scales == 255).nonzero().tolist() == [[2, 1]]
    else:
        assert scales.isnan().sum() == 1


@in_numpy
def test_a_given_scale_leaves_what_is_not_finite_where_it_is() -> None:
    x = torch.tensor([[1.0, float("nan"), float("inf"), float("-inf"), 3e38]], device=DEVICE)
    payload, _ = quantize(x, TENSOR, padded=(1, 5), scale=torch.tensor(0.5, device=DEVICE))
    assert payload.float().isnan().tolist() == [[False, True, True, True, False]]
    assert payload.float()[0, [0, 4]].tolist() == [2.0, 448.0]


def test_layouts_of_scales() -> None:
    x = torch.randn(130, 300, device=DEVICE)
    _, scales = quantize(x, parse_granularity("group:128"), padded=(136, 304))
    assert (scales.shape, scales.stride()) == ((136, 3), (1, 136))
    _, exponents = quantize(x, MX, padded=(136, 304))
    assert exponents.is_contiguous()
    assert exponents[130:].unique().item() == 127
    _, tiles = quantize(x, MX, padded=(136, 304), tiled=True)
    assert tiles.cpu().numpy().tolist() == swizzle.swizzle(exponents.cpu().numpy()).tolist()


def test_rows_may_lie_apart_and_may_be_none() -> None:
    wide = torch.randn(9, 300, device=DEVICE)
    for granularity in GRANULARITIES:
        assert_same_bytes(wide[::2, 3:133], granularity)
        payload, scales = quantize(wide[:0], granularity, padded=(0, 304))
        assert payload.shape == (0, 304)
        assert scales.numel() == (granularity == TENSOR)
        assert_same_bytes(wide[:0], granularity, (8, 304))


def test_activations_that_are_refused() -> None:
    x = torch.zeros(4, 64, device=DEVICE)
    with pytest.raises(ValueError, match="contiguous rows"):
        quantize(x.t(), CHANNEL, padded=(64, 4))
    with pytest.raises(ValueError, match="do not fit"):
        quantize(x, CHANNEL, padded=(4, 48))
    for name in ("group:48", "block:128x128", "group:16"):
        with pytest.raises(ValueError, match="power of two"):
            quantize(x, parse_granularity(name), padded=(4, 64))
    with pytest.raises(ValueError, match="given scale"):
        quantize(x, CHANNEL, padded=(4, 64), scale=torch.ones(1))


# GEMMs


def weight_of(shape: tuple[int, int], region: tuple[int, int], format: Float8Format) -> tuple[Tensor, Tensor]:
    """A weight with another magnitude in each region, as FP8 and scales."""
    torch.manual_seed(shape[0])
    weight = torch.randn(shape) * torch.exp2(torch.randint(-6, 6, shape)).cumsum(0).remainder(9)
    payload, scales = torch_codec.quantize(weight, region, format=format)
    return payload.to(DEVICE), scales.to(DEVICE)


def assert_close(found: Tensor, expected: Tensor) -> None:
    """The relative Frobenius error is that of accumulation in float32 and of one rounding to the result's type."""
    bound = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}[found.dtype]
    if DEVICE == "cuda" and found.dtype == torch.float32:
        bound = 2e-3  # FP8 instructions of Hopper sum 128 products in about 14 bits
    assert (found.double() - expected).norm() <= bound * expected.norm()


REGIONS = ["block:128x128", "block:64x128", "block:3x256", "group:16", "group:32", "group:64", "group:128"]
REGIONS += ["group:384", "channel", "tensor"]
WEIGHTS = [
    pytest.param(region, format, id=f"{region}-{format.name}")
    for format, regions in ((E4M3, REGIONS), (E5M2, ["block:128x128", "group:64", "channel"]))
    for region in regions
]
PRODUCTS = [(1, 1, 1), (5, 40, 130), (33, 70, 280)]


@pytest.mark.parametrize("shape", PRODUCTS, ids=str)
@pytest.mark.parametrize(("region", "format"), WEIGHTS)
def test_gemms_of_quantized_activations(region: str, format: Float8Format, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    size = parse_granularity(region).region((n, k))
    assert serves(size, (n, k)) is None
    weight, weight_scales = weight_of((n, k), size, format)
    by_columns = weight_scales.T.contiguous().T  # strides are free
    exact = torch_codec.dequantize(weight, weight_scales, size).double()
    x = torch.randn(m, k, device=DEVICE) * torch.exp2(torch.arange(m, device=DEVICE) % 7)[:, None]
    bias = torch.randn(n, device=DEVICE)
    for granularity, cols, dtype, added in (
        (TENSOR, None, torch.float32, bias),
        (CHANNEL, None, torch.bfloat16, bias.bfloat16()),
        (parse_granularity("group:128"), 128, torch.float32, None),
    ):
        a, scales = quantize(x, granularity, padded=(m, k))
        area, grid = granularity.region((m, k)), granularity.scale_shape((m, k))
        expected = torch_codec.dequantize(a, scales.reshape(grid), area).double() @ exact.T
        y = scaled_gemm(a, scales, weight, by_columns, a_cols=cols, b_region=size, bias=added, out_dtype=dtype)
        assert y.dtype == dtype
        assert_close(y, expected if added is None else expected + added.double())


@pytest.mark.parametrize("shape", PRODUCTS, ids=str)
@pytest.mark.parametrize(("region", "format"), WEIGHTS)
def test_gemms_of_activations_as_they_are(region: str, format: Float8Format, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    size = parse_granularity(region).region((n, k))
    weight, weight_scales = weight_of((n, k), size, format)
    exact = torch_codec.dequantize(weight, weight_scales, size).double()
    bias = torch.randn(n, device=DEVICE)
    for dtype, out, added in ((torch.bfloat16, torch.float32, None), (torch.float16, torch.float16, bias.half())):
        x = torch.randn(m, k, device=DEVICE).to(dtype)
        expected = x.double() @ exact.T
        y = dequantize_gemm(x, weight, weight_scales, b_region=size, bias=added, out_dtype=out)
        assert_close(y, expected if added is None else expected + added.double())


def test_gemms_in_large_tiles() -> None:
    m, n, k = 1500, 1400, 40  # 132 tiles of 128 x 128
    weight, scales = weight_of((n, k), (128, 128), E4M3)
    a, a_scales = quantize(torch.randn(m, k, device=DEVICE), CHANNEL, padded=(m, k))
    y = scaled_gemm(a, a_scales, weight, scales, a_cols=None, b_region=(128, 128), bias=None, out_dtype=torch.float32)
    known = torch_codec.dequantize(a, a_scales, (1, k)).double()
    assert_close(y, known @ torch_codec.dequantize(weight, scales, (128, 128)).double().T)


def test_a_value_that_is_not_finite_reaches_its_row_of_the_product_only() -> None:
    x = torch.randn(5, 130, device=DEVICE)
    x[2, 7] = float("inf")
    weight, scales = weight_of((20, 130), (128, 128), E4M3)
    a, a_scales = quantize(x, CHANNEL, padded=(5, 130))
    y = scaled_gemm(a, a_scales, weight, scales, a_cols=None, b_region=(128, 128), bias=None, out_dtype=torch.bfloat16)
    assert y.isnan().any(1).tolist() == [False, False, True, False, False]
    assert y[2].isnan().all()


def test_every_code_of_a_weight_is_multiplied_exactly() -> None:
    for format in (E4M3, E5M2):
        codes = torch.tensor([c for c in range(256) if c & 0x7F not in format.nan_codes], dtype=torch.uint8)
        weight = codes.view(getattr(torch, format.torch_dtype)).view(-1, 1).to(DEVICE)
        one = torch.ones(1, 1, device=DEVICE, dtype=torch.bfloat16)
        y = dequantize_gemm(
            one, weight, torch.ones(1, 1, device=DEVICE), b_region=(256, 1), bias=None, out_dtype=torch.float32
        )
        assert torch.equal(y, weight.float().T)


def test_gemms_that_are_not_served() -> None:
    weight, scales = weight_of((8, 100), (1, 24), E4M3)
    assert "24 columns" in (serves((1, 24), (8, 100)) or "")
    assert serves((1, 24), (8, 20)) is None
    assert "empty" in (serves((1, 24), (0, 100)) or "")
    x = torch.zeros(2, 100, device=DEVICE, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="24 columns"):
        dequantize_gemm(x, weight, scales, b_region=(1, 24), bias=None, out_dtype=torch.float32)
    with pytest.raises(ValueError, match="bfloat16 or float16"):
        dequantize_gemm(x.float(), weight, scales, b_region=(1, 128), bias=None, out_dtype=torch.float32)
    assert dequantize_gemm(x[:0], weight, scales, b_region=(1, 128), bias=None, out_dtype=torch.float16).shape == (0, 8)
