"""Checkpoints as people have them: numbered files without an index, leftovers of another tool, files of modules."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoints import MakeCheckpoint, llama_config, llama_tensors, read_tensors, write_shard
from safetensors import safe_open

import fp8pack
from fp8pack.checkpoint.source import open_checkpoint
from fp8pack.errors import InputError

NAME = "model.layers.0.mlp.up_proj.weight"


def test_a_numbered_set_without_an_index_is_read_whole(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint(shards=3)
    with_index = fp8pack.pack(source, tmp_path / "a")
    (source / "model.safetensors.index.json").unlink()
    assert fp8pack.pack(source, tmp_path / "b").num_tensors == with_index.num_tensors
    assert len(list((tmp_path / "b").glob("*.safetensors"))) == 3


@pytest.mark.parametrize("gone", [1, 3])
def test_a_numbered_set_with_a_gap_names_the_file(gone: int, make_checkpoint: MakeCheckpoint) -> None:
    source = make_checkpoint(shards=3)
    (source / "model.safetensors.index.json").unlink()
    (source / f"model-{gone:05}-of-00003.safetensors").unlink()
    with pytest.raises(InputError, match=f"model-{gone:05}-of-00003.safetensors is missing"):
        open_checkpoint(source)


def test_files_of_two_sets_without_an_index_are_refused(make_checkpoint: MakeCheckpoint) -> None:
    source = make_checkpoint(shards=2)
    (source / "model.safetensors.index.json").unlink()
    write_shard(source / "other.safetensors", {"x": np.zeros(2, np.float32)})
    with pytest.raises(InputError, match=r"has 3 \.safetensors files and no index"):
        open_checkpoint(source)


def test_a_leftover_declaration_over_bf16_tensors_is_dropped_with_a_line(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    leftover = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    result = fp8pack.pack(make_checkpoint(config=llama_config() | leftover), tmp_path / "out", scheme="FP8_BLOCK")
    assert any("declares 'bitsandbytes', but no tensor is quantized" in warning for warning in result.warnings)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "fp8"


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("model.layers.0.mlp.up_proj.qweight", np.int32),
        ("model.layers.0.mlp.up_proj.weight", np.uint8),
        ("model.layers.0.mlp.up_proj.weight.absmax", np.float32),
        ("model.layers.0.mlp.up_proj.weight_scale", np.float32),
    ],
)
def test_a_declaration_that_the_tensors_bear_out_is_refused(
    name: str, dtype: type, make_checkpoint: MakeCheckpoint
) -> None:
    tensors = llama_tensors()
    del tensors[NAME]
    tensors[name] = np.ones((64, 64), dtype)
    source = make_checkpoint(tensors, config=llama_config() | {"quantization_config": {"quant_method": "gptq"}})
    with pytest.raises(InputError, match="is quantized already"):
        fp8pack.pack(source, dry_run=True)


def test_a_buffer_of_doubles_is_copied(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    values = np.linspace(0, 1, 64)
    fp8pack.pack(make_checkpoint(llama_tensors() | {"model.steps": values}), tmp_path / "out")
    [path] = (tmp_path / "out").glob("*.safetensors")
    with safe_open(path, "numpy") as stored:
        assert np.array_equal(stored.get_tensor("model.steps"), values)


def test_tensors_that_the_index_does_not_name_are_skipped_with_a_line(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source = make_checkpoint(shards=2)
    index = source / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    del document["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(document))
    result = fp8pack.pack(source, tmp_path / "out")
    assert any("model.norm.weight" in warning for warning in result.warnings)
    stored = {name for path in (tmp_path / "out").glob("*.safetensors") for name in read_tensors(path)}
    assert "model.norm.weight" not in stored
    assert NAME in stored


def test_modules_of_sentence_transformers_come_along(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint()
    modules = [{"idx": 0, "path": ""}, {"idx": 1, "path": "1_Pooling"}, {"idx": 2, "path": "2_Dense"}, {"path": "../x"}]
    (source / "modules.json").write_text(json.dumps(modules))
    for name in ("1_Pooling", "2_Dense"):
        (source / name).mkdir()
        (source / name / "config.json").write_text("{}")
    write_shard(source / "2_Dense" / "model.safetensors", {"linear.weight": np.ones((4, 4), ml_dtypes.bfloat16)})
    fp8pack.pack(source, tmp_path / "out")
    for name in ("1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert fp8pack.inspect(tmp_path / "out").totals.num_packed == 14


@pytest.mark.parametrize("text", ["[", "{}", "[1]", '[{"path": 3}]', "[" * 100_000])
def test_modules_that_are_no_list_of_modules_name_nothing(
    text: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source = make_checkpoint()
    (source / "modules.json").write_text(text)
    assert fp8pack.pack(source, tmp_path / "out").num_packed == 14
