"""Every backend that a CPU has, held against the float64 GEMM of the operands as quantized."""

from dataclasses import replace

import pytest
import torch
from gemms import AS_ENTERED, AS_QUANTIZED, as_quantized, error, weight_of

from fp8pack.gemm.activations import float_scale_of, quantize_activation, quantize_in_torch, quantize_on_cpu
from fp8pack.gemm.operand import Backend
from fp8pack.gemm.reference_backend import ReferenceBackend, dequantize
from fp8pack.gemm.scheme import scheme_of
from fp8pack.gemm.torch_backend import TorchBackend
from fp8pack.numerics import torch_codec
from fp8pack.numerics.formats import E4M3, E5M2, Float8Format
from fp8pack.numerics.granularity import CHANNEL, MX, TENSOR, Granularity, parse_granularity

SHAPES = [(1, 1, 1), (1, 384, 256), (7, 131, 200), (16, 128, 128), (33, 257, 130), (5, 48, 1000)]
GRANULARITIES = ["tensor", "channel", "block:128x128", "block:64x96", "group:64", "group:128", "mx"]


def backends(granularity: str, weight_only: bool) -> list[Backend]:
    serves = granularity in ("tensor", "channel") and not weight_only
    return [ReferenceBackend(), TorchBackend()] if serves else [ReferenceBackend()]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("weight_only", [False, True], ids=["", "weight-only"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("format", [E4M3, E5M2], ids=lambda format: format.name)
def test_results_are_right(
    format: Float8Format, granularity: str, weight_only: bool, shape: tuple[int, int, int]
) -> None:
    (m, n, k), scheme = shape, scheme_of(format, parse_granularity(granularity), weight_only=weight_only)
    payload, scale = weight_of(scheme, n, k)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).bfloat16()
    bias = torch.randn(n, generator=torch.Generator().manual_seed(n)).bfloat16()
    weight = torch_codec.dequantize(payload, scale, scheme.granularity.region((n, k))).double()
    for backend in backends(granularity, weight_only):
        operand = backend.prepare(payload, scale, scheme)
        found = backend.matmul(x, operand, bias, torch.bfloat16)
        assert found.shape == (m, n)
        assert found.dtype == torch.bfloat16
        assert error(found, as_quantized(x, scheme) @ weight.t() + bias.double()) <= AS_QUANTIZED
        if n * m * k > 100:
            assert error(found, x.double() @ weight.t() + bias.double()) <= AS_ENTERED


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("granularity", ["tensor", "channel", "block:128x128", "mx"])
def test_the_result_has_the_dtype_that_is_asked_for(granularity: str, dtype: torch.dtype) -> None:
    scheme = scheme_of(E4M3, parse_granularity(granularity))
    payload, scale = weight_of(scheme, 130, 70)
    weight = torch_codec.dequantize(payload, scale, scheme.granularity.region((130, 70))).double()
    x = torch.randn(9, 70).to(dtype)
    for backend in backends(granularity, False):
        found = backend.matmul(x, backend.prepare(payload, scale, scheme), None, dtype)
        assert found.dtype == dtype
        bound = AS_QUANTIZED if dtype != torch.float32 or backend.name == "torch" else 1e-6
        assert error(found, as_quantized(x, scheme) @ weight.t()) <= bound


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_a_static_scale_is_that_of_every_token(granularity: str) -> None:
    scheme, static = scheme_of(E4M3, parse_granularity(granularity)), torch.tensor([0.004])
    payload, scale = weight_of(scheme, 48, 64)
    weight = torch_codec.dequantize(payload, scale, scheme.granularity.region((48, 64))).double()
    x = torch.randn(5, 64).bfloat16()
    x[0, 0] = 100.0  # beyond the scale: it saturates at 448 * 0.004
    for backend in backends(granularity, False):
        operand = replace(backend.prepare(payload, scale, scheme), input_scale=static)
        expected = as_quantized(x, scheme, static)
        assert expected.max() == pytest.approx(448 * 0.004)
        assert error(backend.matmul(x, operand, None, torch.bfloat16), expected @ weight.t()) <= AS_QUANTIZED


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_padding_changes_no_result(granularity: str) -> None:
    """The same rows and columns, alone and within a larger GEMM whose sizes are multiples of 16."""
    scheme = scheme_of(E4M3, parse_granularity(granularity))
    payload, scale = weight_of(scheme, 32, 48)
    x = torch.randn(16, 48).bfloat16()
    backend = TorchBackend()
    few = scale if granularity == "tensor" else scale[:19]
    even, odd = backend.prepare(payload, scale, scheme), backend.prepare(payload[:19], few, scheme)
    assert (odd.shape, tuple(odd.payload.shape)) == ((19, 48), (32, 48))
    assert odd.padding == pytest.approx(13 / 32)
    static = x.abs().max().float().reshape(1) / 448
    for given in (None, static):
        whole, found = (
            backend.matmul(x, replace(operand, input_scale=given), None, torch.bfloat16) for operand in (even, odd)
        )
        assert torch.equal(found, whole[:, :19])
    rows = backend.matmul(x[:3], replace(odd, input_scale=static), None, torch.bfloat16)
    assert torch.equal(rows, whole[:3, :19])


def test_what_lies_aligned_is_not_copied() -> None:
    for granularity in (TENSOR, CHANNEL):
        scheme = scheme_of(E4M3, granularity)
        payload, scale = weight_of(scheme, 32, 48)
        assert TorchBackend().prepare(payload, scale, scheme).payload.data_ptr() == payload.data_ptr()


@pytest.mark.parametrize("granularity", [TENSOR, CHANNEL, parse_granularity("group:128"), MX])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_never_becomes_a_number(granularity: Granularity, value: float) -> None:
    x = torch.ones(3, 256)
    x[1, 5] = value
    payload, scale = quantize_activation(x, granularity, padded=(3, 256))
    region = granularity.region((3, 256))
    values = torch_codec.dequantize(payload, float_scale_of(scale).reshape(-1, scale.shape[-1]), region)
    assert not torch.isfinite(values[1, 5])
    assert granularity == TENSOR or torch.isfinite(values[0]).all()


def test_without_memory_the_weight_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    scheme = scheme_of(E4M3, parse_granularity("block:128x128"))
    payload, scale = weight_of(scheme, 130, 140)
    x = torch.randn(4, 140).bfloat16()
    kept, lean = (ReferenceBackend().prepare(payload, scale, scheme) for _ in range(2))
    found = [ReferenceBackend().matmul(x, kept, None, torch.bfloat16)]
    monkeypatch.setattr("fp8pack.gemm.reference_backend.usable_memory", lambda: 0)
    found.append(ReferenceBackend().matmul(x, lean, None, torch.bfloat16))
    assert kept.values is not None
    assert list(kept.values) == [torch.bfloat16]
    assert lean.values == {}
    assert torch.equal(*found)


@pytest.mark.parametrize("granularity", [TENSOR, CHANNEL, parse_granularity("group:128"), MX])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("bad", [False, True], ids=["finite", "nan"])
def test_the_kernel_gives_the_bytes_of_torch(
    granularity: Granularity, dtype: torch.dtype, static: bool, bad: bool
) -> None:
    x = (torch.randn(37, 200, generator=torch.Generator().manual_seed(3)) * 100).to(dtype)
    x[5] = 0
    if bad:
        x[7, 11] = torch.nan
    scale = torch.tensor([0.25]) if static else None
    tiled = granularity == MX and not static
    found = quantize_on_cpu(x, granularity, padded=(48, 256), scale=scale, tiled=tiled)
    expected = quantize_in_torch(x, granularity, padded=(48, 256), scale=scale, tiled=tiled)
    assert torch.equal(found[0].view(torch.uint8), expected[0].view(torch.uint8))
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("special", [0x00, 0x7F, 0x7C, 0x80])
def test_the_kernel_dequantizes_as_torch_does(shape: tuple[int, int, int], granularity: str, special: int) -> None:
    generator = torch.Generator().manual_seed(shape[1])
    n, k = shape[1], shape[2]
    region = parse_granularity(granularity).region((n, k))
    codes = torch.randint(0, 0x78, (n, k), generator=generator, dtype=torch.uint8)
    codes[-1, -1] = special
    grid = -(-n // region[0]), -(-k // region[1])
    scales = torch.rand(grid, generator=generator) * 1e-3
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        found, expected = (how(codes.view(dtype), scales, region) for how in (dequantize, torch_codec.dequantize))
        assert torch.equal(found.isnan(), expected.isnan())
        same = ~expected.isnan()
        assert torch.equal(found[same].view(torch.int32), expected[same].view(torch.int32))
