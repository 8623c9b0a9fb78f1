"""Checkpoints of a kind that is refused, and weights that hold a NaN; each says in one line what to do instead."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import verbs
from hostile.hostile_models import FIRST, NAME, Cli, Refused, pack_into, points_to
from safetensors import safe_open

import fp8pack
from fp8pack.errors import Fp8PackError, InputError
from fp8pack.modelfacts.patterns import Pattern
from fp8pack.numerics.granularity import BLOCK_128, CHANNEL, MX, TENSOR, Granularity
from fp8pack.packing.options import WriteOptions
from fp8pack.planning.recipe import Request

# What fp8pack does not take, and the way out.


def test_a_git_lfs_pointer_is_refused_with_git_lfs_pull(built: Any, refused: Refused, tmp_path: Path) -> None:
    model = built.single(tmp_path / "model")
    (model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "git lfs pull" in refused(model)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.ckpt"])
def test_pickled_weights_are_refused_unopened(name: str, refused: Refused, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    assert "save_pretrained" in refused(model)


def test_a_lora_adapter_is_refused_with_merging_first(built: Any, refused: Refused, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    built.shard(model / "adapter_model.safetensors", {"base.lora_A.weight": built.bits(0)})
    (model / "adapter_config.json").write_text("{}")
    assert "merge" in refused(model)


def test_a_diffusers_pipeline_is_refused_with_its_transformer(built: Any, refused: Refused, tmp_path: Path) -> None:
    model = tmp_path / "model"
    built.single(model / "transformer")
    (model / "model_index.json").write_text("{}")
    assert f"{model}/transformer" in refused(model)


def test_gguf_files_are_refused(refused: Refused, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "model-Q4.gguf").write_bytes(b"GGUF" + bytes(100))
    assert "GGUF" in refused(model)


def test_a_directory_without_weights_is_refused(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    assert "no .safetensors file" in refused(tmp_path / "model")


def test_a_checkpoint_without_tensors_is_refused(built: Any, refused: Refused, tmp_path: Path) -> None:
    refused(built.single(tmp_path / "model", {}))


def test_tensors_that_are_fp8_already_are_refused(built: Any, refused: Refused, tmp_path: Path) -> None:
    model = built.single(tmp_path / "model")
    pack_into(model, tmp_path / "packed")
    (tmp_path / "packed" / "config.json").write_text("{}")
    assert "F8_E4M3 already" in refused(tmp_path / "packed")


def test_a_weight_with_a_scale_of_its_own_is_not_packed_over_it(built: Any, tmp_path: Path) -> None:
    extra = {NAME + "_scale": built.bits(8, 128, 1), NAME + "_scale_inv": built.bits(9, 1, 1)}
    model = built.single(tmp_path / "model", built.layer(0) | extra)
    try:
        pack_into(model, tmp_path / "out")
    except Fp8PackError as error:
        assert NAME in str(error)
        assert not (tmp_path / "out").exists()
    else:
        packed = dict(safetensors.deserialize((tmp_path / "out" / "model.safetensors").read_bytes()))
        for name, bits in extra.items():
            assert bytes(packed[name]["data"]) == bits.tobytes()


# Weights that hold a NaN or infinity.

NAN, INFINITY = 0x7FC0, 0x7F80


def spoil(bits: Any, value: int) -> Any:
    """Return the bits with one of them replaced."""
    spoilt = bits.copy()
    spoilt[3, 5] = value
    return spoilt


@pytest.mark.slow
def test_every_weight_with_a_nan_or_infinity_is_named_and_what_is_finished_is_used_again(
    built: Any, cli: Cli, tmp_path: Path
) -> None:
    model = built.sharded(tmp_path / "model")
    other = "model.layers.0.self_attn.o_proj.weight"
    tensors = built.layer(0)
    built.shard(model / FIRST, tensors | {NAME: spoil(tensors[NAME], NAN), other: spoil(tensors[other], INFINITY)})
    refusal = cli("pack", model, "-o", "out", "-q")
    assert refusal.returncode == 3
    assert len(refusal.stderr.splitlines()) == 1
    flags = re.findall(r"--ignore|(?<=--ignore )\S+", refusal.stderr)
    assert sorted(flags) == sorted(["--ignore", NAME, "--ignore", other])
    assert not (tmp_path / "out").exists()
    mended = cli("pack", model, "-o", "out", "--json", *flags)
    assert mended.returncode == 0
    assert json.loads(mended.stdout)["resumed_nbytes"] > 0
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out"}


@pytest.mark.parametrize(
    ("value", "granularity"),
    [(NAN, TENSOR), (INFINITY, TENSOR), (0xFFC1, CHANNEL), (0xFF80, CHANNEL), (NAN, BLOCK_128), (INFINITY, MX)],
    ids=["nan-tensor", "inf-tensor", "negative-nan-channel", "negative-inf-channel", "nan-block", "inf-mx"],
)
def test_a_nan_in_a_model_of_one_shard_is_mended_by_the_flag_that_the_message_names(
    value: int, granularity: Granularity, built: Any, tmp_path: Path
) -> None:
    tensors = built.layer(0)
    model = built.single(tmp_path / "model", tensors | {NAME: spoil(tensors[NAME], value)})
    options = WriteOptions(output=tmp_path / "out")
    request = Request(granularity=granularity)
    with pytest.raises(InputError, match=f"NaN or infinity: {NAME}"):
        verbs.pack(model, request, options)
    assert not (tmp_path / "out").exists()
    verbs.pack(model, replace(request, ignore=(Pattern(NAME),)), options)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out"}


def test_a_nan_in_a_tensor_that_is_copied_is_copied(built: Any, tmp_path: Path) -> None:
    name = "model.layers.0.input_layernorm.weight"
    norm = np.full(128, NAN, np.uint16)
    model = built.single(tmp_path / "model", built.layer(0) | {name: norm})
    pack_into(model, tmp_path / "out")
    packed = dict(safetensors.deserialize((tmp_path / "out" / "model.safetensors").read_bytes()))
    assert bytes(packed[name]["data"]) == norm.tobytes()


# The command line: exit code, one line, nothing left behind.


def test_a_refused_checkpoint_ends_with_code_3_and_one_line(built: Any, cli: Cli, tmp_path: Path) -> None:
    model = built.single(tmp_path / "model")
    os.truncate(model / "model.safetensors", 100)
    ran = cli("pack", model, "-o", "out")
    assert (ran.returncode, ran.stdout) == (3, "")
    assert len(ran.stderr.splitlines()) == 1
    assert ran.stderr.startswith("fp8pack: model.safetensors")
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["org/unknown-name", "../modle", "a/b..c", "./a/-b", "a" * 60 + "/" + "b" * 60])
def test_a_repository_or_path_that_is_not_there_ends_with_code_3_and_one_line(
    name: str, cli: Cli, tmp_path: Path
) -> None:
    ran = cli("pack", name)
    assert (ran.returncode, ran.stdout) == (3, "")
    assert len(ran.stderr.splitlines()) == 1
    if name == "org/unknown-name":
        assert "hf download org/unknown-name" in ran.stderr


def test_an_output_that_exists_ends_with_code_4_and_one_line(built: Any, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    ran = cli("pack", built.single(tmp_path / "model"), "-o", "out", "-q")
    assert (ran.returncode, ran.stdout) == (4, "")
    assert len(ran.stderr.splitlines()) == 1


def test_an_output_in_a_missing_directory_ends_with_code_5_and_one_line(built: Any, cli: Cli, tmp_path: Path) -> None:
    ran = cli("pack", built.single(tmp_path / "model"), "-o", "missing/out", "-q")
    assert (ran.returncode, ran.stdout) == (5, "")
    assert len(ran.stderr.splitlines()) == 1


def test_a_hostile_checkpoint_is_refused_by_inspect_as_well(built: Any, cli: Cli, tmp_path: Path) -> None:
    model = built.mend_index(built.sharded(tmp_path / "model"), points_to("../../etc/x.safetensors"))
    ran = cli("inspect", model)
    assert (ran.returncode, ran.stdout) == (3, "")
    assert len(ran.stderr.splitlines()) == 1


def test_what_was_packed_from_an_odd_checkpoint_opens_in_the_safetensors_library(built: Any, tmp_path: Path) -> None:
    tensors = built.layer(0) | {"../../etc/passwd": built.bits(4), "x" * 4096: built.bits(5)}
    pack_into(built.single(tmp_path / "model", tensors), tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", framework="numpy") as opened:
        assert set(opened.keys()) >= set(tensors)


@pytest.mark.parametrize("read", [fp8pack.inspect, fp8pack.unpack, fp8pack.verify, fp8pack.load_packed])
def test_a_path_that_no_file_system_has_is_refused(read: Any) -> None:
    with pytest.raises(InputError, match="file name too long"):
        read("x" * 300)


@pytest.mark.parametrize("read", [fp8pack.inspect, fp8pack.unpack, fp8pack.load_packed, fp8pack.convert])
def test_a_manifest_that_contradicts_the_files_is_refused(read: Any, built: Any, tmp_path: Path) -> None:
    pack_into(built.single(tmp_path / "model"), tmp_path / "out")
    path = tmp_path / "out" / "fp8pack.json"
    document = json.loads(path.read_bytes())
    name = next(name for name, entry in document["tensors"].items() if entry["action"] == "packed")
    del document["tensors"][name]
    path.write_text(json.dumps(document))
    options = {"quant_method": "fp8pack"} if read is fp8pack.convert else {}
    with pytest.raises(Fp8PackError, match=r"is not in fp8pack\.json"):
        read(tmp_path / "out", **options)
