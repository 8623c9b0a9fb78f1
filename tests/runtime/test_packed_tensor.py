"""A packed weight: its scale is the float32 multiplier in every granularity, and multiplies to the same bits."""

from pathlib import Path

import ml_dtypes
import numpy as np
import oracle
import pytest
import torch
import verbs
from checkpoints import MakeCheckpoint, random_weight
from numpy.typing import NDArray

import fp8pack
from fp8pack.numerics import swizzle
from fp8pack.numerics.formats import parse_format
from fp8pack.numerics.granularity import parse_granularity
from fp8pack.packing.prepare import WriteOptions
from fp8pack.planning.recipe import Request

NAME = "model.layers.0.mlp.up_proj.weight"
SHAPES = [(131, 200), (128, 256), (1, 1), (7, 33), (257, 129)]
GRANULARITIES = ["tensor", "channel", "group:64", "group:1000", "block:128x128", "block:64x96", "block:1000x1000", "mx"]
STORED = ["float32", "bfloat16", "exponents", "e8m0", "tiled"]


def floats(payload: NDArray[np.uint8], format: str) -> NDArray[np.float32]:
    return payload.view(oracle.ELEMENT[format][0]).astype(np.float32)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int32)


def made(qdata: NDArray[np.uint8], stored: torch.Tensor, granularity: str, **more: object) -> fp8pack.PackedTensor:
    """An e4m3 weight as a loader would make it."""
    shape = (int(np.prod(qdata.shape[:-1])), qdata.shape[-1])
    region = parse_granularity(granularity).region(shape)
    payload = torch.from_numpy(qdata).view(torch.float8_e4m3fn)
    return fp8pack.PackedTensor("w", payload, stored, "e4m3", granularity, region, torch.bfloat16, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("format", ["e4m3", "e5m2"])
def test_the_scale_is_the_multiplier(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, format: str, granularity: str, shape: tuple[int, int]
) -> None:
    weight = random_weight(shape, 3)
    asked = Request(format=parse_format(format), granularity=parse_granularity(granularity), quant_method="fp8pack")
    verbs.pack(make_checkpoint({NAME: weight}), asked, WriteOptions(tmp_path / "out"))
    packed = fp8pack.load_packed(tmp_path / "out")[NAME]
    assert isinstance(packed, fp8pack.PackedTensor)
    rounding = "up" if granularity == "mx" else "none"
    payload, scales = oracle.quantize(weight.astype(np.float32), format, granularity, rounding)
    spread = oracle.spread(scales, oracle.region_of(granularity, shape), shape)
    np.testing.assert_array_equal(packed.qdata.view(torch.uint8).numpy(), payload)
    assert (packed.scale.dtype, packed.expand_scale().dtype) == (torch.float32, torch.float32)
    np.testing.assert_array_equal(packed.scale.numpy(), scales)
    np.testing.assert_array_equal(packed.expand_scale().numpy(), spread)
    np.testing.assert_array_equal(packed.dequantize(torch.float32).numpy(), floats(payload, format) * spread)
    assert torch.equal(bits(packed.qdata.float() * packed.expand_scale()), bits(packed.dequantize(torch.float32)))
    assert packed.scale is packed.scale


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("shape", [(131, 200), (128, 128), (1, 1), (129, 31)], ids=str)
def test_the_scale_is_float32_however_it_is_stored(stored: str, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    payload = rng.integers(0, 127, shape, np.uint8)
    grid = (shape[0], -(-shape[1] // 32))
    exponents = rng.integers(0, 255, grid, np.uint8)  # 2^-127, which is subnormal, to 2^127
    scales = exponents.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    tensor = {
        "float32": lambda: torch.from_numpy(scales),
        "bfloat16": lambda: torch.from_numpy(scales).bfloat16(),
        "exponents": lambda: torch.from_numpy(exponents),
        "e8m0": lambda: torch.from_numpy(exponents).view(torch.float8_e8m0fnu),
        "tiled": lambda: torch.from_numpy(swizzle.swizzle(exponents)),
    }[stored]()
    packed = made(payload, tensor, "mx", tiled=stored == "tiled")
    spread = oracle.spread(scales, (1, 32), shape)
    np.testing.assert_array_equal(packed.scale.numpy(), scales)
    np.testing.assert_array_equal(packed.expand_scale().numpy(), spread)
    with np.errstate(over="ignore"):
        expected = floats(payload, "e4m3") * spread
    np.testing.assert_array_equal(packed.dequantize(torch.float32).numpy(), expected)
    assert torch.equal(bits(packed.qdata.float() * packed.expand_scale()), bits(packed.dequantize(torch.float32)))


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group:24", "block:5x64", "block:16x24", "mx"])
def test_a_fused_weight_counts_as_rows(granularity: str) -> None:
    rng = np.random.default_rng(2)
    payload = rng.integers(0, 127, (3, 10, 70), np.uint8)
    grid = parse_granularity(granularity).scale_shape((30, 70))
    scales = rng.uniform(0.001, 2, grid).astype(np.float32)
    packed = made(payload, torch.from_numpy(scales), granularity)
    spread = oracle.spread(scales, oracle.region_of(granularity, (30, 70)), (30, 70)).reshape(3, 10, 70)
    assert packed.expand_scale().shape == packed.shape == (3, 10, 70)
    np.testing.assert_array_equal(packed.expand_scale().numpy(), spread)
    np.testing.assert_array_equal(packed.dequantize(torch.float32).numpy(), floats(payload, "e4m3") * spread)


@pytest.mark.parametrize("shape", [(0, 64), (5, 0)], ids=str)
@pytest.mark.parametrize("granularity", ["tensor", "channel", "block:128x128", "mx"])
def test_an_empty_weight_has_scales_of_its_shape(granularity: str, shape: tuple[int, int]) -> None:
    packed = made(np.ones(shape, np.uint8), torch.ones(1), granularity)
    assert (packed.expand_scale().shape, packed.expand_scale().dtype) == (shape, torch.float32)
    assert packed.dequantize().shape == shape
    found = fp8pack.linear(torch.ones(2, shape[1]), packed, torch.full((shape[0],), 3.0))
    assert found.tolist() == [[3.0] * shape[0]] * 2


def test_a_vector_is_one_row() -> None:
    packed = made(np.full(64, 0x38, np.uint8), torch.tensor(0.25), "tensor")  # 0x38 is 1.0
    assert packed.scale.tolist() == [[0.25]]
    assert packed.expand_scale().tolist() == packed.dequantize().tolist() == [0.25] * 64


def test_one_name_for_each_thing() -> None:
    packed = made(np.ones((4, 32), np.uint8), torch.ones(4, 1), "channel")
    assert not {"data", "multiplier", "payload"} & set(dir(packed))


def test_what_is_printed_is_short(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    weights = {NAME: random_weight((131, 200), 3), "model.norm.weight": random_weight((200,))}
    asked = Request(granularity=parse_granularity("block:128x128"), quant_method="fp8pack")
    verbs.pack(make_checkpoint(weights), asked, WriteOptions(tmp_path / "out"))
    loaded = fp8pack.load_packed(tmp_path / "out")
    assert repr(loaded) == (
        "PackedCheckpoint(1 e4m3 block:128x128, 1 plain, 26.6 kB, activations='dynamic', quant_method='fp8pack')"
    )
    with pytest.raises(KeyError, match=f"did you mean '{NAME}'"):
        loaded[NAME.removesuffix(".weight")]
    assert loaded.get("another") is None
    assert str(loaded[NAME]) == repr(loaded[NAME])
    assert repr(loaded[NAME]) == (
        f"PackedTensor('{NAME}', shape=[131, 200], format='e4m3', granularity='block:128x128', block=(128, 128), "
        "scale=[2, 2], device='cpu')"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_a_scale_that_is_none_is_refused_where_it_is_used(value: float) -> None:
    weight = made(np.zeros((4, 8), np.uint8), torch.tensor([[1.0], [1.0], [value], [1.0]]), "channel")
    for use in (lambda: weight.scale, weight.dequantize, weight.expand_scale, lambda: weight.operand):
        with pytest.raises(fp8pack.InputError, match="'w' has a scale that is negative or not finite"):
            use()
    exponents = made(np.zeros((4, 32), np.uint8), torch.tensor([[127], [0], [255], [1]], dtype=torch.uint8), "mx")
    with pytest.raises(fp8pack.InputError, match="negative or not finite"):
        _ = exponents.scale
