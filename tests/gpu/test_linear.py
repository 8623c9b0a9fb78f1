"""FP8 on a CUDA device: GEMMs of every backend, scheme and odd shape against float64; the same bytes as the CPU."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import verbs
from checkpoints import DEMO, MakeCheckpoint, random_weight
from gemms import AS_ENTERED, AS_QUANTIZED, as_quantized, error, random, weight_of
from torch import Tensor

import fp8pack
from fp8pack.gemm.activations import float_scale_of, quantize_activation, quantize_in_torch
from fp8pack.gemm.choose import candidates, verify
from fp8pack.gemm.device import describe
from fp8pack.gemm.operand import Backend
from fp8pack.gemm.scheme import TRIED_GRANULARITIES, GemmScheme, scheme_of
from fp8pack.gemm.torch_backend import TorchBackend, torch_problem
from fp8pack.numerics import torch_codec
from fp8pack.numerics.formats import E4M3, E5M2, FORMATS, Float8Format
from fp8pack.numerics.granularity import CHANNEL, MX, TENSOR, Granularity, parse_granularity
from fp8pack.numerics.native import quantize_rows
from fp8pack.numerics.rounding import ScaleRounding
from fp8pack.packing.options import WriteOptions
from fp8pack.planning.recipe import Request

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

DEVICE = torch.device("cuda")
GRANULARITIES = ["tensor", "channel", "block:128x128", "block:64x128", "group:64", "group:128", "mx"]
SHAPES = [
    (1, 384, 256), (1, 4096, 4096), (7, 131, 200), (16, 128, 128), (17, 1024, 1000), (33, 257, 130), (130, 48, 1040),
    (300, 520, 700),
]  # fmt: skip
NAME = "model.layers.0.mlp.up_proj.weight"


def rounding_of(granularity: Granularity) -> ScaleRounding:
    return ScaleRounding.UP if granularity == MX else ScaleRounding.NONE


def backends(scheme: GemmScheme) -> Iterator[Backend]:
    """Every backend that should serve a scheme on this device."""
    return (found.backend for found in candidates(scheme, describe(DEVICE)) if found.problem is None)


def packed(make: MakeCheckpoint, out: Path, granularity: str, shape: tuple[int, int]) -> fp8pack.PackedTensor:
    asked = Request(granularity=parse_granularity(granularity), quant_method="fp8pack")
    verbs.pack(make({NAME: random_weight(shape, 3)}), asked, WriteOptions(out))
    found = fp8pack.load_packed(out, DEVICE)[NAME]
    assert isinstance(found, fp8pack.PackedTensor)
    return found


# GEMMs


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("weight_only", [False, True], ids=["", "weight-only"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_every_backend_is_right(
    format: Float8Format, granularity: str, weight_only: bool, shape: tuple[int, int, int]
) -> None:
    (m, n, k), scheme = shape, scheme_of(format, parse_granularity(granularity), weight_only=weight_only)
    payload, scale = weight_of(scheme, n, k)
    weight = torch_codec.dequantize(payload, scale, scheme.granularity.region((n, k))).double()
    x, bias = random(m, k, seed=m).bfloat16(), random(n, seed=n).bfloat16()
    expected = as_quantized(x, scheme) @ weight.t() + bias.double()
    entered = x.double() @ weight.t() + bias.double()
    tried = []
    for backend in backends(scheme):
        operand = backend.prepare(payload.to(DEVICE), scale.to(DEVICE), scheme)
        found = backend.matmul(x.to(DEVICE), operand, bias.to(DEVICE), torch.bfloat16)
        assert (found.shape, found.dtype) == ((m, n), torch.bfloat16)
        assert error(found, expected) <= AS_QUANTIZED, backend.name
        assert error(found, entered) <= AS_ENTERED, backend.name
        tried.append(backend.name)
    assert "reference" in tried


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
@pytest.mark.parametrize("weight_only", [False, True], ids=["", "weight-only"])
@pytest.mark.parametrize("granularity", TRIED_GRANULARITIES, ids=str)
def test_a_backend_without_a_problem_is_right(
    granularity: Granularity, weight_only: bool, format: Float8Format
) -> None:
    scheme = scheme_of(format, granularity, weight_only=weight_only)
    assert {backend.name: verify(backend, scheme, DEVICE) for backend in backends(scheme)} == {
        backend.name: None for backend in backends(scheme)
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("granularity", ["tensor", "channel", "block:128x128", "group:64", "mx"])
def test_the_result_has_the_dtype_that_is_asked_for(granularity: str, dtype: torch.dtype) -> None:
    scheme = scheme_of(E4M3, parse_granularity(granularity))
    payload, scale = weight_of(scheme, 130, 70)
    weight = torch_codec.dequantize(payload, scale, scheme.granularity.region((130, 70))).double()
    x = random(9, 70, seed=9).to(dtype)
    for backend in backends(scheme):
        operand = backend.prepare(payload.to(DEVICE), scale.to(DEVICE), scheme)
        found = backend.matmul(x.to(DEVICE), operand, None, dtype)
        assert found.dtype == dtype
        assert error(found, as_quantized(x, scheme) @ weight.t()) <= AS_QUANTIZED, backend.name


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_a_static_scale_saturates_on_every_backend(granularity: str) -> None:
    scheme, static = scheme_of(E4M3, parse_granularity(granularity)), torch.tensor([0.004])
    payload, scale = weight_of(scheme, 48, 64)
    weight = torch_codec.dequantize(payload, scale, scheme.granularity.region((48, 64))).double()
    x = random(5, 64, seed=5).bfloat16()
    x[0, 0] = 100.0
    for backend in backends(scheme):
        operand = backend.prepare(payload.to(DEVICE), scale.to(DEVICE), scheme)
        found = backend.matmul(x.to(DEVICE), replace(operand, input_scale=static.to(DEVICE)), None, torch.bfloat16)
        assert error(found, as_quantized(x, scheme, static) @ weight.t()) <= AS_QUANTIZED, backend.name


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group:64", "block:128x128", "mx"])
def test_a_loaded_weight_multiplies(make_checkpoint: MakeCheckpoint, tmp_path: Path, granularity: str) -> None:
    weight = packed(make_checkpoint, tmp_path / "out", granularity, (131, 200))
    x, bias = random(2, 3, 200, seed=1).bfloat16(), random(131, seed=2).bfloat16()
    expected = x.double() @ weight.dequantize(torch.float32).cpu().double().t() + bias.double()
    found = fp8pack.linear(x.to(DEVICE), weight, bias.to(DEVICE))
    assert (found.shape, found.dtype, found.device.type) == ((2, 3, 131), torch.bfloat16, DEVICE.type)
    assert error(found, expected) <= AS_ENTERED
    on_cpu = replace(weight, qdata=weight.qdata.cpu(), stored_scale=weight.stored_scale.cpu())
    moved = fp8pack.FP8Linear(on_cpu, bias).to(DEVICE)
    assert torch.equal(moved(x.to(DEVICE)), found)
    assert fp8pack.linear(x[:, :0].to(DEVICE), weight).shape == (2, 0, 131)


@pytest.mark.parametrize("rows", [1, 16, 100])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group:64", "block:128x128", "mx"])
def test_a_captured_graph_gives_what_eager_gives(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, granularity: str, rows: int
) -> None:
    weight = packed(make_checkpoint, tmp_path / "out", granularity, (384, 256))
    x = random(rows, 256, seed=rows).bfloat16().to(DEVICE)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what is made at the first call must not be part of the graph
        for _ in range(3):
            fp8pack.linear(x, weight)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = fp8pack.linear(x, weight)
    for seed in (7, 8):
        x.copy_(random(rows, 256, seed=seed).bfloat16())
        graph.replay()
        assert torch.equal(captured, fp8pack.linear(x, weight))


@pytest.mark.parametrize("shape", [(16, 128, 256), (256, 512, 1024)], ids=str)
@pytest.mark.parametrize("format", [E4M3, E5M2], ids=lambda format: format.name)
def test_gemms_with_one_scale_agree_with_nvmath(format: Float8Format, shape: tuple[int, int, int]) -> None:
    nvmath = pytest.importorskip("nvmath")
    (m, n, k), scheme = shape, scheme_of(format, TENSOR)
    if (problem := torch_problem(scheme, describe(DEVICE))) is not None:
        pytest.skip(problem)
    payload, scale = (tensor.to(DEVICE) for tensor in weight_of(scheme, n, k))
    x = random(m, k, seed=m).bfloat16().to(DEVICE)
    entered, entered_scale = quantize_activation(x, TENSOR, padded=(m, k))
    expected = nvmath.linalg.advanced.matmul(
        entered,
        payload.t(),
        quantization_scales={"a": entered_scale.reshape(1), "b": scale.reshape(1)},
        options={"result_type": nvmath.CudaDataType.CUDA_R_16BF},
    )
    backend = TorchBackend()
    found = backend.matmul(x, backend.prepare(payload, scale, scheme), None, torch.bfloat16)
    assert error(found, expected.cpu().double()) <= AS_QUANTIZED


# models


@pytest.mark.parametrize("scheme", ["FP8_BLOCK", "FP8_DYNAMIC", "MXFP8", "W8A16"])
def test_the_demo_model_generates_in_fp8(tmp_path: Path, scheme: str) -> None:
    fp8pack.pack(DEMO, tmp_path / "out", scheme=scheme)
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    models: list[Any] = [fp8pack.load_model(tmp_path / "out", device) for device in ("cpu", DEVICE)]
    with torch.no_grad():
        known, found = (model(input_ids=ids.to(model.device)).logits.float() for model in models)
    assert error(found, known.double()) < 0.1
    text = models[1].generate(input_ids=ids.to(DEVICE), max_new_tokens=5, do_sample=False)
    assert text.shape == (1, 11)
    operand = next(module for module in models[1].modules() if isinstance(module, fp8pack.FP8Linear)).packed.operand
    report = fp8pack.report_fp8(models[1])
    assert report.on == {(str(operand), next(backends(operand.scheme)).name): 28}


# activations

ACTIVATIONS = [TENSOR, CHANNEL, parse_granularity("group:128"), parse_granularity("group:32"), MX]


def patterns() -> Tensor:
    """Every finite BF16 pattern, in order, [255, 256]."""
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    return bits[torch.isfinite(bits)].view(255, 256)


def assert_same_bits(x: Tensor, granularity: Granularity, **options: Any) -> None:
    """The kernel, the reference on the device and the reference on the CPU give the same payload and scales."""
    padded = (x.shape[0] + 1, x.shape[1] + 16)
    found = quantize_activation(x.to(DEVICE), granularity, padded=padded, **options)
    for place in (DEVICE, torch.device("cpu")):
        moved = {key: value.to(place) if isinstance(value, Tensor) else value for key, value in options.items()}
        expected = quantize_in_torch(x.to(place), granularity, padded=padded, **moved)
        for one, two in zip(found, expected, strict=True):
            assert (one.dtype, one.shape) == (two.dtype, two.shape)
            assert 1 in one.shape or one.stride() == two.stride()
            if one.dtype == torch.uint8:
                assert torch.equal(one.cpu(), two.cpu())
                continue
            a, b = one.cpu().float(), two.cpu().float()  # a NaN has many bit patterns
            assert torch.equal(a.isnan(), b.isnan())
            assert torch.equal(a.nan_to_num().view(torch.int32), b.nan_to_num().view(torch.int32))


@pytest.mark.parametrize("order", ["ascending", "mixed"])
@pytest.mark.parametrize("granularity", ACTIVATIONS, ids=str)
def test_every_finite_pattern_becomes_the_bytes_of_the_reference(granularity: Granularity, order: str) -> None:
    values = patterns()
    if order == "mixed":
        shuffled = torch.randperm(values.numel(), generator=torch.Generator().manual_seed(0))
        values = values.reshape(-1)[shuffled].view(values.shape)
    assert_same_bits(values, granularity)
    if granularity == MX:
        assert_same_bits(values, granularity, tiled=True)


def patterns_that_are_not_finite() -> Tensor:
    """The infinities and NaNs of BF16, [256]."""
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    return bits[~torch.isfinite(bits)]


@pytest.mark.parametrize("scale", [2.0**-126, 1e-3, 0.37, 1.0, 3e30])
def test_every_pattern_under_a_static_scale(scale: float) -> None:
    static = torch.tensor([scale], device=DEVICE)
    assert_same_bits(patterns(), TENSOR, scale=static)
    bad = patterns_that_are_not_finite().view(1, 256).to(DEVICE)
    payload, _ = quantize_activation(bad, TENSOR, padded=(1, 256), scale=static)
    assert payload.float().isnan().all()


@pytest.mark.parametrize("granularity", ACTIVATIONS, ids=str)
def test_every_pattern_that_is_not_finite_spoils_its_region_alone(granularity: Granularity) -> None:
    bad, clean = patterns_that_are_not_finite(), random(257, 256, seed=0).bfloat16()
    rows, cols = granularity.region((257, 256))
    spoilt, x = torch.zeros(257, 256, dtype=torch.bool), clean.clone()
    for i, value in enumerate(bad):
        x[i, i] = value
        spoilt[i // rows * rows :, i // cols * cols :][:rows, :cols] = True
    found, scales = quantize_activation(x.to(DEVICE), granularity, padded=(257, 256))
    grid = float_scale_of(scales).reshape(-1, scales.shape[-1])
    values = torch_codec.dequantize(found, grid, (rows, cols)).cpu()
    assert torch.equal(torch.isfinite(values), ~spoilt)
    expected, _ = quantize_in_torch(clean, granularity, padded=(257, 256))
    assert torch.equal(found.view(torch.uint8).cpu()[~spoilt], expected.view(torch.uint8)[~spoilt])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("granularity", ACTIVATIONS, ids=str)
def test_large_activations_become_the_bytes_of_the_reference(granularity: Granularity, dtype: torch.dtype) -> None:
    x = random(513, 4100, seed=1) * torch.exp2(random(513, 4100, seed=2) * 6)
    assert_same_bits(x.clamp(-6e4, 6e4).to(dtype), granularity)


# packing: the device against the kernels of the CPU

REGIONS_AT_ONCE, TIMES, WIDTH = 500_000, 20, 16  # 10^7 regions


def assert_packs_alike(bits: np.ndarray[Any, Any], format: Float8Format, granularity: Granularity) -> None:
    """BF16 bits [N, K] become the same payload and scales on both."""
    shape, rounding = bits.shape, rounding_of(granularity)
    region = granularity.region(shape)
    payload, scales = np.empty(shape, np.uint8), np.empty(granularity.scale_shape(shape), np.float32)
    quantize_rows(bits, payload, scales, dtype="BF16", region=region, format=format, rounding=rounding)
    weight = torch.from_numpy(bits.view(np.int16)).to(DEVICE).view(torch.bfloat16)
    found, found_scales = torch_codec.quantize(weight, region, format=format, rounding=rounding)
    assert torch.equal(found.view(torch.uint8).cpu(), torch.from_numpy(payload))
    assert torch.equal(found_scales.view(torch.int32).cpu(), torch.from_numpy(scales.view(np.int32)))


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group:16", "group:64", "block:128x128", "mx"])
@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_every_finite_pattern_packs_to_the_bytes_of_the_cpu(format: Float8Format, granularity: str) -> None:
    bits = patterns().view(torch.int16).numpy().view(np.uint16)
    mixed = np.random.default_rng(0).permutation(bits.reshape(-1)).reshape(bits.shape)
    for values in (bits, mixed):
        assert_packs_alike(values, format, parse_granularity(granularity))


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_ten_million_random_regions_pack_to_the_bytes_of_the_cpu(format: Float8Format) -> None:
    """Half of them of any finite patterns, half of values within a few binades, as weights are."""
    random_bits, granularity = np.random.default_rng(0), parse_granularity(f"group:{WIDTH}")
    for number in range(TIMES):
        shape = (REGIONS_AT_ONCE // 100, 100 * WIDTH)
        if number % 2:
            bits = random_bits.integers(0, 1 << 16, shape, np.uint16)
            bits[bits & 0x7F80 == 0x7F80] ^= 0x4000  # what is not finite gets another exponent
        else:
            values = random_bits.standard_normal(shape, np.float32) * np.float32(0.02)
            bits = (values.view(np.uint32) >> 16).astype(np.uint16)
        assert_packs_alike(bits, format, granularity)
