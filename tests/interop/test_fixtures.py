"""Checkpoints that other tools wrote: our values are theirs, bit for bit, however they are reached."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import read_tensors
from torch import Tensor

import fp8pack
from fp8pack.checkpoint.quantized import read_contents
from fp8pack.checkpoint.source import open_checkpoint
from fp8pack.errors import RecipeError

FIXTURES = {path.parent.name: path.parent for path in Path(__file__).parent.glob("fixtures/*/expected.json")}
METHODS = ("fp8", "compressed-tensors", "modelopt", "quark", "mxfp8", "fp8pack")
METHOD = {
    "llmcompressor": "compressed-tensors",
    "modelopt": "modelopt",
    "quark": "quark",
    "torchao": "",
    "autoround": "",
}
# How each of them stores its weights, and which conventions hold that without touching a byte.
STORED = {
    "autoround-fp8_static": ("channel", "static", {"compressed-tensors", "fp8pack"}),
    "llmcompressor-fp8": ("tensor", "static", {"fp8", "compressed-tensors", "modelopt", "quark", "fp8pack"}),
    "llmcompressor-fp8_block": (
        "block:128x128", "dynamic", {"fp8", "compressed-tensors", "modelopt", "quark", "fp8pack"},
    ),
    "llmcompressor-fp8_dynamic": ("channel", "dynamic", {"compressed-tensors", "modelopt", "quark", "fp8pack"}),
    "llmcompressor-moe": ("channel", "dynamic", {"compressed-tensors", "modelopt", "quark", "fp8pack"}),
    "llmcompressor-mxfp8": ("mx", "dynamic", {"compressed-tensors", "modelopt", "quark", "mxfp8", "fp8pack"}),
    "llmcompressor-w8a16_fp8": ("channel", "none", {"compressed-tensors", "quark", "fp8pack"}),
    "modelopt-fp8": ("tensor", "static", {"fp8", "compressed-tensors", "modelopt", "quark", "fp8pack"}),
    "modelopt-fp8_pb_wo": ("block:128x128", "dynamic", {"fp8", "compressed-tensors", "modelopt", "quark", "fp8pack"}),
    "modelopt-fp8_per_channel_per_token": (
        "channel", "dynamic", {"compressed-tensors", "modelopt", "quark", "fp8pack"},
    ),
    "modelopt-moe": ("tensor", "static", {"fp8", "compressed-tensors", "modelopt", "quark", "fp8pack"}),
    "modelopt-mxfp8": ("mx", "dynamic", {"compressed-tensors", "modelopt", "quark", "mxfp8", "fp8pack"}),
    "quark-fp8": ("tensor", "static", {"fp8", "compressed-tensors", "modelopt", "quark", "fp8pack"}),
    "quark-ptpc_fp8": ("channel", "dynamic", {"compressed-tensors", "modelopt", "quark", "fp8pack"}),
    "torchao-dynamic-per-row": ("channel", "dynamic", {"compressed-tensors", "modelopt", "quark", "fp8pack"}),
    "torchao-dynamic-per-tensor": ("tensor", "dynamic", {"fp8", "compressed-tensors", "quark", "fp8pack"}),
    "torchao-weight-only": ("channel", "none", {"compressed-tensors", "quark", "fp8pack"}),
}  # fmt: skip

LOW_BITS = {
    "llmcompressor-mxfp4a16": {("e2m1", "mx")},
    "llmcompressor-nvfp4": {("e2m1", "group:16")},
    "llmcompressor-nvfp4a16": {("e2m1", "group:16")},
    "llmcompressor-w4a16": {("int4", "group:32")},
    "llmcompressor-w4a16_asym": {("int4", "group:32")},
    "llmcompressor-w8a16": {("int8", "group:32")},
    "llmcompressor-w8a8": {("int8", "channel")},
    "modelopt-nvfp4": {("e2m1", "group:16")},
    "modelopt-nvfp4_mixed": {("e2m1", "group:16"), ("e4m3", "tensor")},
    "transformers-gpt_oss": {("e2m1", "block:32x1")},
}  # in test_low_bits.py


def expected_of(name: str) -> dict[str, Any]:
    return dict(json.loads((FIXTURES[name] / "expected.json").read_text()))


def digest(values: Tensor) -> str:
    return hashlib.sha256(values.float().contiguous().numpy().tobytes()).hexdigest()


def dequantized(folder: Path) -> dict[str, Tensor]:
    """The float32 values of every FP8 weight."""
    loaded = fp8pack.load_packed(folder)
    return {
        name: tensor.dequantize(torch.float32)
        for name, tensor in loaded.items()
        if isinstance(tensor, fp8pack.PackedTensor)
    }


def test_every_fixture_is_under_test() -> None:
    assert set(FIXTURES) == set(STORED) | set(LOW_BITS)


@pytest.mark.parametrize("name", STORED)
def test_what_the_tool_wrote_is_understood(name: str) -> None:
    contents = read_contents(open_checkpoint(FIXTURES[name]))
    granularity, activations, _ = STORED[name]
    assert {quantized.granularity.name for quantized in contents.quantized.values()} == {granularity}
    assert contents.activations == activations
    assert contents.unread == ()
    assert not any("scale" in spec.name for spec in contents.tensors)
    if activations == "static":
        assert all(quantized.input_scale for quantized in contents.quantized.values())


@pytest.mark.parametrize("name", STORED)
def test_loaded_weights_have_the_values_that_the_tool_computes(name: str) -> None:
    found, expected = dequantized(FIXTURES[name]), expected_of(name)
    assert found.keys() == expected.keys()
    for weight, entry in expected.items():
        values = found[weight] if entry["dtype"] == "float32" else found[weight].to(getattr(torch, entry["dtype"]))
        assert list(values.shape) == entry["shape"]
        assert digest(values) == entry["sha256"], weight


@pytest.mark.parametrize("name", STORED)
def test_unpacked_weights_have_the_values_that_the_tool_computes(name: str, tmp_path: Path) -> None:
    expected = expected_of(name)
    fp8pack.unpack(FIXTURES[name], tmp_path / "out", dtype="float32")
    found = read_tensors(tmp_path / "out")
    for weight, entry in expected.items():
        values = torch.from_numpy(found[weight].copy()).to(getattr(torch, entry["dtype"]))
        assert digest(values) == entry["sha256"], weight
    assert not any("scale" in tensor for tensor in found)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", STORED)
def test_converted_weights_keep_their_values(name: str, method: str, tmp_path: Path) -> None:
    """Every byte is carried, blocks with ragged edges, too, or the convention is refused with those that can."""
    _, _, methods = STORED[name]
    if method not in methods:
        with pytest.raises(RecipeError) as caught:
            fp8pack.convert(FIXTURES[name], tmp_path / "out", quant_method=method)
        offered = caught.value.command_line.partition("--quant-method ")[2].split(" or ")
        assert methods <= set(offered)
        return
    before, source = dequantized(FIXTURES[name]), read_contents(open_checkpoint(FIXTURES[name]))
    facts = fp8pack.convert(FIXTURES[name], tmp_path / "out", quant_method=method)
    after, result = dequantized(tmp_path / "out"), read_contents(open_checkpoint(tmp_path / "out"))
    assert facts.num_carried == len(after) == len(before)
    for weight, values in before.items():
        assert torch.equal(after[weight], values), weight
    assert set(result.kv_scales) == set(source.kv_scales)
    assert result.activations == source.activations


@pytest.mark.parametrize(
    "name", [name for name, (_, _, methods) in STORED.items() if METHOD[name.partition("-")[0]] in methods]
)
def test_through_our_own_convention_and_back_no_tensor_of_theirs_changes(name: str, tmp_path: Path) -> None:
    """Values, names and shapes; scales of 16 bits come back as float32 with the same numbers."""
    method = METHOD[name.partition("-")[0]]
    fp8pack.convert(FIXTURES[name], tmp_path / "there", quant_method="fp8pack")
    fp8pack.convert(tmp_path / "there", tmp_path / "back", quant_method=method)
    before, after = read_tensors(FIXTURES[name]), read_tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    for tensor in before:
        assert before[tensor].size == after[tensor].size
        assert before[tensor].astype("f4").tobytes() == after[tensor].astype("f4").tobytes(), tensor


@pytest.mark.parametrize("name", STORED)
def test_inspect_and_diff_take_them(name: str, tmp_path: Path) -> None:
    facts = fp8pack.inspect(FIXTURES[name])
    assert facts.totals.num_packed == len(expected_of(name))
    assert facts.engines
    compared = fp8pack.diff(FIXTURES[name], FIXTURES[name])
    assert compared.totals.num_equal == compared.totals.num_tensors
