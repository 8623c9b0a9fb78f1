from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
import verbs
from checkpoints import MakeCheckpoint, llama_tensors, random_weight
from safetensors.numpy import save_file

import fp8pack
from fp8pack.errors import InputError
from fp8pack.numerics.formats import parse_format
from fp8pack.numerics.granularity import parse_granularity
from fp8pack.numerics.value_table import value_table
from fp8pack.packing.options import WriteOptions
from fp8pack.planning.recipe import Request


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group:64", "block:128x128", "block:48x80", "mx"])
@pytest.mark.parametrize("format", ["e4m3", "e5m2"])
def test_dequantizing_gives_payload_times_scale(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, format: str, granularity: str
) -> None:
    weight = random_weight((131, 200), 3)
    asked = Request(format=parse_format(format), granularity=parse_granularity(granularity), quant_method="fp8pack")
    verbs.pack(make_checkpoint({"model.layers.0.mlp.up_proj.weight": weight}), asked, WriteOptions(tmp_path / "out"))
    packed = fp8pack.load_packed(tmp_path / "out")["model.layers.0.mlp.up_proj.weight"]
    rounding = "up" if granularity == "mx" else "none"
    payload, scales = oracle.quantize(weight.astype(np.float32), format, granularity, rounding)
    region = oracle.region_of(granularity, (131, 200))
    expected = value_table(parse_format(format))[payload] * oracle.spread(scales, region, (131, 200))
    assert isinstance(packed, fp8pack.PackedTensor)
    np.testing.assert_array_equal(packed.dequantize(torch.float32).numpy(), expected)
    assert packed.dequantize().dtype == torch.bfloat16
    assert packed.shape == (131, 200)


def test_a_checkpoint_is_a_mapping_of_all_its_tensors(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    tensors = llama_tensors()
    fp8pack.pack(make_checkpoint(tensors, shards=2), tmp_path / "out")
    loaded = fp8pack.load_packed(tmp_path / "out")
    assert set(loaded) == tensors.keys()
    assert len(loaded) == len(tensors)
    norm = loaded["model.norm.weight"]
    assert isinstance(norm, torch.Tensor)
    assert norm.view(torch.int16).numpy().tobytes() == tensors["model.norm.weight"].tobytes()
    assert (loaded.quant_method, loaded.kv_scales, loaded.config["model_type"]) == ("fp8", {}, "qwen3")


@pytest.mark.parametrize("granularity", ["tensor", "channel", "block:128x128", "mx"])
def test_a_fused_weight_is_a_view_of_its_parts(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, granularity: str
) -> None:
    fp8pack.pack(make_checkpoint(), tmp_path / "out", granularity=parse_granularity(granularity))
    loaded = fp8pack.load_packed(tmp_path / "out")
    for module, leaves in (("self_attn.qkv_proj", "q k v"), ("mlp.gate_up_proj", "gate up")):
        parent = module.split(".")[0]
        parts = [loaded[f"model.layers.1.{parent}.{leaf}_proj.weight"] for leaf in leaves.split()]
        fused = loaded.fused(f"model.layers.1.{module}")
        assert fused.qdata.data_ptr() == parts[0].qdata.data_ptr()
        assert torch.equal(fused.dequantize(), torch.cat([part.dequantize() for part in parts]))


def test_fused_experts_stand_in_the_order_of_the_engines(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    experts = "model.layers.0.mlp.experts"
    shapes = {"gate_proj": (128, 256), "up_proj": (128, 256), "down_proj": (256, 128)}
    tensors = {
        f"{experts}.{i}.{leaf}.weight": random_weight(shape, i) for i in range(11) for leaf, shape in shapes.items()
    }
    fp8pack.pack(make_checkpoint(tensors), tmp_path / "out")
    loaded = fp8pack.load_packed(tmp_path / "out")
    fused = loaded.fused(f"{experts}.gate_up_proj")
    names = [f"{experts}.{i}.{leaf}.weight" for i in range(11) for leaf in ("gate_proj", "up_proj")]
    assert torch.equal(fused.dequantize(), torch.cat([loaded[name].dequantize() for name in names]))
    assert fused.qdata.data_ptr() == loaded[names[0]].qdata.data_ptr()
    assert loaded.fused(f"{experts}.down_proj").shape == (11 * 256, 128)


def test_parts_in_two_shards_are_joined_by_a_copy(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    fp8pack.pack(make_checkpoint(llama_tensors(1), shards=9), tmp_path / "out")
    loaded = fp8pack.load_packed(tmp_path / "out")
    parts = [loaded[f"model.layers.0.self_attn.{leaf}_proj.weight"] for leaf in "qkv"]
    assert torch.equal(
        loaded.fused("model.layers.0.self_attn.qkv_proj").dequantize(), torch.cat([part.dequantize() for part in parts])
    )
    with pytest.raises(KeyError):
        loaded.fused("model.layers.7.self_attn.qkv_proj")


def test_a_single_file_loads_by_its_own_path(tmp_path: Path) -> None:
    save_file(llama_tensors(), tmp_path / "x.safetensors")
    fp8pack.pack(tmp_path / "x.safetensors")
    loaded = fp8pack.load_packed(tmp_path / "x-FP8-block.safetensors")
    assert isinstance(loaded["model.layers.0.mlp.up_proj.weight"], fp8pack.PackedTensor)


def test_what_is_not_packed_is_refused_with_the_command(make_checkpoint: MakeCheckpoint) -> None:
    with pytest.raises(InputError, match="no FP8 weight") as caught:
        fp8pack.load_packed(make_checkpoint())
    assert "fp8pack pack" in caught.value.hint
