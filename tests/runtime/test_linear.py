"""fp8pack.linear and FP8Linear on packed weights: leading dimensions, odd shapes, moves and casts of a module."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import verbs
from checkpoints import MakeCheckpoint, random_weight

import fp8pack
from fp8pack.numerics.granularity import parse_granularity
from fp8pack.packing.options import WriteOptions
from fp8pack.planning.recipe import Request

NAME = "model.layers.0.mlp.up_proj.weight"
GRANULARITIES = ["tensor", "channel", "group:64", "block:128x128", "mx"]


def weight(
    make: MakeCheckpoint, out: Path, granularity: str = "block:128x128", shape: tuple[int, int] = (131, 200)
) -> fp8pack.PackedTensor:
    asked = Request(granularity=parse_granularity(granularity), quant_method="fp8pack")
    verbs.pack(make({NAME: random_weight(shape, 3)}), asked, WriteOptions(out))
    found = fp8pack.load_packed(out)[NAME]
    assert isinstance(found, fp8pack.PackedTensor)
    return found


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_leading_dimensions_are_tokens(make_checkpoint: MakeCheckpoint, tmp_path: Path, granularity: str) -> None:
    packed = weight(make_checkpoint, tmp_path / "out", granularity)
    x, bias = torch.randn(2, 3, 5, 200).bfloat16(), torch.randn(131).bfloat16()
    found = fp8pack.linear(x, packed, bias)
    assert (found.shape, found.dtype) == ((2, 3, 5, 131), torch.bfloat16)
    assert error(found, torch.nn.functional.linear(x.double(), packed.dequantize().double(), bias.double())) <= 4e-2
    if granularity != "tensor":  # whose scale is that of all tokens
        assert torch.equal(fp8pack.linear(x[1, 2], packed, bias), found[1, 2])


@pytest.mark.parametrize("shape", [(0, 200), (3, 0, 200)])
def test_no_tokens_give_no_rows(make_checkpoint: MakeCheckpoint, tmp_path: Path, shape: tuple[int, ...]) -> None:
    packed = weight(make_checkpoint, tmp_path / "out")
    assert fp8pack.linear(torch.empty(shape), packed, torch.ones(131)).shape == (*shape[:-1], 131)


def test_the_operand_is_made_once(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    weight(make_checkpoint, tmp_path / "out")
    loaded = fp8pack.load_packed(tmp_path / "out")
    first, again = loaded[NAME], loaded[NAME]
    assert isinstance(first, fp8pack.PackedTensor)
    assert isinstance(again, fp8pack.PackedTensor)
    assert first.operand is again.operand


def test_a_static_scale_can_be_given(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    packed = weight(make_checkpoint, tmp_path / "out", "channel")
    x = torch.randn(4, 200).bfloat16()
    wide = fp8pack.linear(x, packed, input_scale=x.abs().max().float() / 448)
    narrow = fp8pack.linear(x, packed, input_scale=torch.tensor(0.001))
    expected = torch.nn.functional.linear(x.double(), packed.dequantize().double())
    assert error(wide, expected) <= 4e-2
    assert error(narrow, expected) > 0.1


def test_what_does_not_fit_is_said(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    packed = weight(make_checkpoint, tmp_path / "out")
    with pytest.raises(ValueError, match=r"x has shape \[2, 201\]"):
        fp8pack.linear(torch.ones(2, 201), packed)
    with pytest.raises(ValueError, match="which exclude a static activation scale"):
        fp8pack.linear(torch.ones(2, 200), packed, input_scale=torch.ones(1))
    experts = replace(packed, qdata=packed.qdata.expand(2, -1, -1))
    with pytest.raises(ValueError, match="is several weights"):
        fp8pack.linear(torch.ones(2, 200), experts)
    for x in (torch.ones(2, 200).to(torch.float8_e4m3fn), torch.ones(2, 200, dtype=torch.int64)):
        with pytest.raises(ValueError, match="bfloat16, float16 and float32"):
            fp8pack.FP8Linear(packed)(x)
    with pytest.raises(ValueError, match=r"out_dtype torch\.int8"):
        fp8pack.linear(torch.ones(2, 200), packed, out_dtype=torch.int8)
    with pytest.raises(ValueError, match=r"x has shape \[\]"):
        fp8pack.linear(torch.ones(()), packed)
    for bias in (torch.ones(1), torch.ones(2, 131), torch.ones(131, device="meta")):
        with pytest.raises(ValueError, match="bias is"):
            fp8pack.linear(torch.ones(2, 200), packed, bias)
    with pytest.raises(ValueError, match="x is on meta"):
        fp8pack.linear(torch.ones(2, 200, device="meta"), packed)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_module_keeps_its_bytes_whatever_it_is_cast_to(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, granularity: str
) -> None:
    packed = weight(make_checkpoint, tmp_path / "out", granularity)
    layer = fp8pack.FP8Linear(packed, torch.randn(131).bfloat16())
    x = torch.randn(3, 200).bfloat16()
    before = layer(x)
    dtypes = {name: tensor.dtype for name, tensor in layer.state_dict().items()}
    layer.to(torch.float32).half().double()
    assert {name: tensor.dtype for name, tensor in layer.state_dict().items()} == dtypes
    assert torch.equal(layer(x), before)
    assert layer(x.float()).dtype == torch.float32
    assert "block" in repr(layer) or granularity in repr(layer)


def test_a_module_computes_with_what_was_loaded_into_it(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    packed = weight(make_checkpoint, tmp_path / "out")
    first = fp8pack.FP8Linear(packed)
    moved = fp8pack.FP8Linear(packed).to("meta").to_empty(device="cpu")
    moved.load_state_dict(first.state_dict())
    x = torch.randn(3, 200).bfloat16()
    assert torch.equal(moved(x), first(x))
    moved.weight_scale_inv = torch.nn.Parameter(first.weight_scale_inv * 2, requires_grad=False)
    assert error(moved(x), 2 * first(x)) < 1e-2
    moved.load_state_dict(first.state_dict())
    assert torch.equal(moved(x), first(x))


def test_a_copy_takes_the_parameters_and_nothing_else(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    layer = fp8pack.FP8Linear(weight(make_checkpoint, tmp_path / "out"))
    x = torch.randn(3, 200).bfloat16()
    before = layer(x)
    copied = deepcopy(layer)
    assert copied._prepared is None
    assert all(not torch.is_tensor(value) or not value.numel() for value in vars(copied._form).values())
    assert torch.equal(copied(x), before)
    layer.to("meta")
    assert layer._prepared is None


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_autocast_and_inference_mode_change_nothing(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, granularity: str
) -> None:
    packed, x = weight(make_checkpoint, tmp_path / "out", granularity), torch.randn(3, 200) * 100
    expected = fp8pack.linear(x, packed, out_dtype=torch.float32)
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype):
            assert torch.equal(fp8pack.linear(x, packed, out_dtype=torch.float32), expected)
    with torch.inference_mode():
        assert torch.equal(fp8pack.FP8Linear(packed)(x), expected)


def test_a_weight_only_checkpoint_leaves_activations_as_they_are(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source = make_checkpoint({NAME: random_weight((128, 128), 3)})
    fp8pack.pack(source, tmp_path / "out", scheme="W8A16")
    loaded = fp8pack.load_packed(tmp_path / "out")
    packed, x = loaded[NAME], torch.randn(5, 128).bfloat16()
    assert isinstance(packed, fp8pack.PackedTensor)
    assert (loaded.activations, packed.weight_only, packed.operand.scheme.activation) == ("none", True, None)
    expected = torch.nn.functional.linear(x.double(), packed.dequantize(torch.float32).double())
    assert error(fp8pack.linear(x, packed), expected) <= 5e-3
