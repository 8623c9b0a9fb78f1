"""Packing with scales of activations: what is stored, where, under which names, and the same bytes everywhere."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
import verbs
from blake3 import blake3
from checkpoints import MakeCheckpoint, Tensors, llama_config, llama_tensors, random_weight
from numpy.typing import NDArray
from packing.static_sources import HISTORIES, POINTS, calibrate, files_of, llama_sites, pack_static, site, stored
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import fp8pack
from fp8pack.checkpoint.journal import Journal
from fp8pack.checkpoint.manifest_schema import ActivationEntry, Manifest, read_manifest
from fp8pack.checkpoint.source import open_checkpoint
from fp8pack.errors import DeadlineError, InputError, OutputError
from fp8pack.numerics.granularity import parse_granularity
from fp8pack.packing.options import WriteOptions
from fp8pack.planning.recipe import Request
from fp8pack.planning.sizes import Sizes

SCHEMA = Path(__file__).parents[2] / "docs" / "schemas" / "manifest.schema.json"


def amax_of(module: str) -> float:
    """What enters a module of the Llama-like model, the largest of all prompts."""
    layer, rest = int(module.split(".")[2]), module.split(".", 3)[3]
    names = {point.removesuffix(".input"): first for first, points in POINTS.items() for point in points}
    first = names.get(rest, f"{rest}.input" if f"{rest}.input" in HISTORIES else rest)
    return max(HISTORIES[first]) * (layer + 1)


def scale_by_hand(amax: float) -> bytes:
    return (np.float32(amax) / np.float32(448)).tobytes()


def shard_of(folder: Path) -> dict[str, str]:
    """The file that each tensor lies in."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as opened:
            found |= dict.fromkeys(opened.keys(), path.name)
    return found


def packed_names(tensors: Mapping[str, NDArray[Any]]) -> list[str]:
    return [name for name in tensors if name.endswith("_proj.weight")]


def fused_amax(tensors: Tensors, name: str) -> float:
    """The amax of a weight and all that engines fuse it with."""
    parent, leaf = name.removesuffix(".weight").rsplit(".", 1)
    groups = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
    leaves = next((group for group in groups if leaf in group), (leaf,))
    parts = [tensors[f"{parent}.{part}.weight"].astype(np.float32) for part in leaves]
    return max(float(np.abs(part).max()) for part in parts)


def entries_of(manifest: Manifest) -> dict[str, tuple[str, ActivationEntry]]:
    """Stored name -> the tensor beside which a scale lies, and its entry."""
    return {
        entry.tensor: (name, entry) for name, tensor in manifest.tensors.items() for entry in tensor.activation_scales
    }


def check_manifest(folder: Path) -> dict[str, tuple[str, ActivationEntry]]:
    """The manifest says of every scale of activations what the file holds; return the entries."""
    document = json.loads((folder / "fp8pack.json").read_bytes())
    assert oracle.root_of(document) == document["root"]
    manifest, found, files = Manifest.model_validate(document), stored(folder), shard_of(folder)
    required = set(json.loads(SCHEMA.read_text())["$defs"]["ActivationEntry"]["required"])
    for tensor in document["tensors"].values():
        assert all(entry.keys() == required for entry in tensor.get("activation_scales", []))
    entries = entries_of(manifest)
    for name, (owner, entry) in entries.items():
        dtype, shape, data = found[name]
        assert (dtype, list(shape)) == (entry.dtype, entry.shape)
        assert np.frombuffer(data, "<f4").item() == entry.value
        assert entry.digest == f"blake3:{blake3(data).hexdigest()}"
        assert files[name] == files[owner] == manifest.tensors[owner].file
        assert entry.amax == max(entry.amax_history_seed)
    owned = {entry.scale_inv.tensor for entry in manifest.tensors.values() if entry.action == "packed"}
    assert found.keys() == manifest.tensors.keys() | owned | entries.keys()
    return entries


# What is stored.


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("kv_cache", [False, True])
def test_modelopt_holds_the_scales_that_were_computed_by_hand(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, kv_cache: bool, shards: int
) -> None:
    tensors = llama_tensors()
    source = make_checkpoint(tensors, shards=shards)
    facts = pack_static(source, tmp_path / "out", calibrate(source), kv_cache=kv_cache)
    assert (facts.recipe["scheme"], facts.recipe["quant_method"]) == ("FP8", "modelopt")
    found, names = stored(tmp_path / "out"), packed_names(tensors)
    assert len(names) == facts.num_packed == 14
    for name in names:
        module = name.removesuffix(".weight")
        payload, scale = oracle.quantize(
            tensors[name].astype(np.float32), "e4m3", "tensor", amax=fused_amax(tensors, name)
        )
        assert found[name] == ("F8_E4M3", tensors[name].shape, payload.tobytes())
        assert found[f"{module}.weight_scale"] == ("F32", (), scale.tobytes())
        assert found[f"{module}.input_scale"] == ("F32", (), scale_by_hand(amax_of(module)))
    kv = {name for name in found if name.endswith(("k_scale", "v_scale"))}
    expected = {f"model.layers.{i}.self_attn.{kind}_proj.{kind}_scale" for i in range(2) for kind in "kv"}
    assert kv == (expected if kv_cache else set())
    for name in kv:
        attention, kind = name.rsplit(".", 2)[0], name[-7]
        assert found[name] == ("F32", (), scale_by_hand(amax_of(f"{attention}.{kind}")))
    entries = check_manifest(tmp_path / "out")
    assert len(entries) == 14 + len(kv)
    entry = entries["model.layers.1.mlp.down_proj.input_scale"][1]
    assert (entry.kind, entry.point) == ("input", "model.layers.1.mlp.down_proj.input")
    assert entry.amax_history_seed == [256.0, 8.0, 260.0]


@pytest.mark.parametrize("kv_cache", [False, True])
def test_modelopt_is_announced_in_both_files(make_checkpoint: MakeCheckpoint, tmp_path: Path, kv_cache: bool) -> None:
    source = make_checkpoint()
    pack_static(source, tmp_path / "out", calibrate(source), kv_cache=kv_cache)
    float8 = {"dynamic": False, "num_bits": 8, "type": "float"}
    producer = {"name": "fp8pack", "version": "1"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config | {"quantization_config": 0} == llama_config() | {"quantization_config": 0}
    assert config["quantization_config"] == {
        "quant_method": "modelopt",
        "quant_algo": "FP8",
        "config_groups": {"group_0": {"input_activations": float8, "weights": float8, "targets": ["Linear"]}},
        "ignore": ["lm_head"],
        "producer": producer,
        **({"kv_cache_scheme": float8} if kv_cache else {}),
    }
    assert json.loads((tmp_path / "out" / "hf_quant_config.json").read_text()) == {
        "producer": producer,
        "quantization": {
            "quant_algo": "FP8",
            "kv_cache_quant_algo": "FP8" if kv_cache else None,
            "exclude_modules": ["lm_head"],
        },
    }
    manifest = read_manifest(tmp_path / "out" / "fp8pack.json")
    content = (tmp_path / "out" / "hf_quant_config.json").read_bytes()
    assert manifest.files["hf_quant_config.json"].digest == f"blake3:{blake3(content).hexdigest()}"
    assert set(manifest.files) | {"fp8pack.json"} == {path.name for path in (tmp_path / "out").iterdir()}


def test_other_methods_write_no_second_file(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint()
    pack_static(source, tmp_path / "out", calibrate(source), quant_method="compressed-tensors")
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()


@pytest.mark.parametrize("kv_cache", [False, True])
def test_compressed_tensors_holds_static_tensor_scales(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, kv_cache: bool
) -> None:
    tensors = llama_tensors()
    source = make_checkpoint(tensors)
    asked = {"quant_method": "compressed-tensors", "kv_cache": kv_cache}
    pack_static(source, tmp_path / "out", calibrate(source), **asked)
    found = stored(tmp_path / "out")
    for name in packed_names(tensors):
        module = name.removesuffix(".weight")
        _, scale = oracle.quantize(tensors[name].astype(np.float32), "e4m3", "tensor", amax=fused_amax(tensors, name))
        assert found[f"{module}.weight_scale"] == ("F32", (1,), scale.tobytes())
        assert found[f"{module}.input_scale"] == ("F32", (1,), scale_by_hand(amax_of(module)))
    kv = {f"model.layers.{i}.self_attn.{kind}" for i in range(2) for kind in "kv"} if kv_cache else set()
    assert {name for name in found if name.endswith(("k_scale", "v_scale"))} == {f"{point}_scale" for point in kv}
    for point in kv:
        assert found[f"{point}_scale"] == ("F32", (1,), scale_by_hand(amax_of(point)))
    tensor = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "strategy": "tensor"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["config_groups"] == {
        "group_0": {
            "format": "float-quantized",
            "input_activations": tensor,
            "output_activations": None,
            "targets": ["Linear"],
            "weights": tensor,
        }
    }
    assert (config["format"], config["ignore"]) == ("float-quantized", ["lm_head"])
    assert config["kv_cache_scheme"] == (tensor if kv_cache else None)
    assert len(check_manifest(tmp_path / "out")) == 14 + len(kv)


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group:64", "block:128x128", "block:48x80", "mx"])
def test_our_own_method_holds_static_scales_beside_any_granularity(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, granularity: str
) -> None:
    tensors = llama_tensors(1)
    source = make_checkpoint(tensors)
    calibration = calibrate(source, sites=llama_sites(1))
    typed = {"granularity": parse_granularity(granularity), "activations": "static", "quant_method": "fp8pack"}
    facts = pack_static(source, tmp_path / "out", calibration, kv_cache=True, **typed)
    assert facts.recipe["quant_method"] == "fp8pack"
    found = stored(tmp_path / "out")
    for name in packed_names(tensors):
        module = name.removesuffix(".weight")
        assert found[f"{module}.input_scale"] == ("F32", (), scale_by_hand(amax_of(module)))
    for kind in "kv":
        point = f"model.layers.0.self_attn.{kind}"
        assert found[f"{point}_scale"] == ("F32", (), scale_by_hand(amax_of(point)))
    assert len(check_manifest(tmp_path / "out")) == 7 + 2
    without = Request(**{key: value for key, value in typed.items() if key != "activations"}, activations="dynamic")
    verbs.pack(source, without, WriteOptions(tmp_path / "dynamic"))
    dynamic = stored(tmp_path / "dynamic")
    assert {name: found[name] for name in dynamic} == dynamic


@pytest.mark.parametrize("scheme", ["FP8_BLOCK", "FP8_DYNAMIC", "MXFP8", "W8A16", "tensor"])
def test_kv_cache_scales_change_no_other_tensor(make_checkpoint: MakeCheckpoint, tmp_path: Path, scheme: str) -> None:
    source = make_checkpoint()
    asked: dict[str, Any] = {"scheme": scheme}
    if scheme == "tensor":
        asked = {"scheme": "auto", "granularity": parse_granularity("tensor")}
    fp8pack.pack(source, tmp_path / "plain", **asked)
    facts = pack_static(source, tmp_path / "kv", calibrate(source), kv_cache=True, **asked)
    plain, with_kv = stored(tmp_path / "plain"), stored(tmp_path / "kv")
    assert {name: with_kv[name] for name in plain} == plain
    ours = facts.recipe["quant_method"] == "fp8"
    assert {name: with_kv[name] for name in with_kv.keys() - plain.keys()} == {
        f"{point}_scale": ("F32", () if ours else (1,), scale_by_hand(amax_of(point)))
        for point in (f"model.layers.{i}.self_attn.{kind}" for i in range(2) for kind in "kv")
    }
    config = json.loads((tmp_path / "kv" / "config.json").read_text())["quantization_config"]
    before = json.loads((tmp_path / "plain" / "config.json").read_text())["quantization_config"]
    assert config.pop("kv_cache_scheme")
    assert config == {key: value for key, value in before.items() if key != "kv_cache_scheme"}
    assert {entry.kind for _, entry in check_manifest(tmp_path / "kv").values()} == {"k", "v"}


@pytest.mark.parametrize(
    ("asked", "amax"),
    [
        ({"margin": 2}, 260.0),
        ({"margin": -3}, 260.0),
        ({"warmup": 1}, 260.0),
        ({"warmup": 2}, 260.0),
        ({"percentile": 96.5}, 8.0),
        ({"percentile": 97.0}, 256.0),
        ({"percentile": 50.0}, 260.0),  # zero clips nothing
    ],
)
def test_options_reach_the_file(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, asked: dict[str, Any], amax: float
) -> None:
    """Of the 64 values of a site 61 are zero, and the next one is the 62nd: 96.9 %."""
    source = make_checkpoint()
    pack_static(source, tmp_path / "out", calibrate(source), **asked)
    data = stored(tmp_path / "out")["model.layers.1.mlp.down_proj.input_scale"][2]
    scale = np.float32(amax) / np.float32(448) if amax else np.float32(1)
    assert data == (scale * np.float32(2.0 ** asked.get("margin", 0))).tobytes()
    entry = entries_of(read_manifest(tmp_path / "out" / "fp8pack.json"))["model.layers.1.mlp.down_proj.input_scale"][1]
    assert entry.amax == amax
    assert entry.amax_history_seed == [256.0, 8.0, 260.0][asked.get("warmup", 0) :]


def test_a_mixture_of_experts_is_packed_whole(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    experts = "model.layers.0.mlp.experts"
    shapes = {"gate_proj": (128, 256), "up_proj": (128, 256), "down_proj": (256, 128)}
    names = {f"{experts}.{i}.{leaf}": shape for i in range(5) for leaf, shape in shapes.items()}
    source = make_checkpoint(
        {f"{name}.weight": random_weight(shape, i) for i, (name, shape) in enumerate(names.items())}
    )
    sites = [
        found
        for i, tokens in enumerate((64, 40, 31))
        for found in (
            site([f"{experts}.{i}.gate_proj.input", f"{experts}.{i}.up_proj.input"], [1.0 + i, 0.0, 0.0], tokens),
            site([f"{experts}.{i}.down_proj.input"], [8.0, 16.0 - i, 0.0], tokens),
        )
    ]
    facts = pack_static(source, tmp_path / "out", calibrate(source, sites=sites))
    assert facts.num_packed == 15
    assert any("the other experts of the layer" in text for text in facts.warnings)
    found = stored(tmp_path / "out")
    expected = {"gate_proj": [1.0, 2.0, 3.0, 3.0, 3.0], "down_proj": [16.0, 15.0, 16.0, 16.0, 16.0]}
    for i in range(5):
        for leaf in shapes:
            amax = expected["down_proj" if leaf == "down_proj" else "gate_proj"][i]
            assert found[f"{experts}.{i}.{leaf}.input_scale"] == ("F32", (), scale_by_hand(amax))
    assert {entry.tensor for _, entry in check_manifest(tmp_path / "out").values()} == {
        f"{n}.input_scale" for n in names
    }


# Where it lies.


@pytest.mark.parametrize("limit", [70_000, 150_000, 400_000])
@pytest.mark.parametrize("shards", [1, 4])
def test_a_weight_and_its_scales_lie_in_one_shard(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, shards: int, limit: int
) -> None:
    source = make_checkpoint(shards=shards)
    calibration = calibrate(source)
    asked = Request(scheme="FP8", calibration=calibration, kv_cache=True)
    verbs.pack(source, asked, WriteOptions(tmp_path / "out", max_shard_size=limit))
    pack_static(source, tmp_path / "whole", calibration, kv_cache=True)
    assert stored(tmp_path / "out") == stored(tmp_path / "whole")
    files = shard_of(tmp_path / "out")
    assert len(set(files.values())) > 1
    for name in files:
        if name.endswith("_scale"):
            assert files[name] == files[name.rsplit(".", 1)[0] + ".weight"]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == files
    assert index["metadata"]["total_size"] == sum(len(data) for _, _, data in stored(tmp_path / "out").values())
    check_manifest(tmp_path / "out")


@pytest.mark.parametrize("granularity", ["channel", "block:128x128", "mx"])
@pytest.mark.parametrize("what", ["kv", "static"])
def test_the_scales_of_a_fused_weight_still_lie_next_to_each_other(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, what: str, granularity: str
) -> None:
    """A fused weight is one view of payloads and scales alike: nothing else may lie between the scales of its parts."""
    source = make_checkpoint()
    asked: dict[str, Any] = {"granularity": parse_granularity(granularity)}
    asked |= {"kv_cache": True} if what == "kv" else {"activations": "static", "quant_method": "fp8pack"}
    pack_static(source, tmp_path / "out", calibrate(source), "auto", **asked)
    loaded = fp8pack.load_packed(tmp_path / "out")
    for module in ("self_attn.qkv_proj", "mlp.gate_up_proj"):
        fused = loaded.fused(f"model.layers.1.{module}")
        leaf = "self_attn.q_proj" if "qkv" in module else "mlp.gate_proj"
        first = loaded[f"model.layers.1.{leaf}.weight"]
        assert isinstance(first, fp8pack.PackedTensor)
        assert fused.qdata.data_ptr() == first.qdata.data_ptr()
        assert fused.stored_scale.data_ptr() == first.stored_scale.data_ptr(), module


def test_payloads_stay_aligned(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint(shards=2)
    pack_static(source, tmp_path / "out", calibrate(source), kv_cache=True)
    for spec in open_checkpoint(tmp_path / "out").specs:
        assert spec.begin % (16 if spec.dtype == "F8_E4M3" else 4 if spec.dtype == "F32" else 1) == 0, spec.name


# The same bytes.


def test_workers_memory_strips_and_device_change_no_byte(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint(shards=3)
    asked = Request(scheme="FP8", calibration=calibrate(source), kv_cache=True)
    verbs.pack(source, asked, WriteOptions(tmp_path / "one", workers=1))
    reference = files_of(tmp_path / "one")
    verbs.pack(source, asked, WriteOptions(tmp_path / "many", workers=7))
    verbs.pack(source, asked, WriteOptions(tmp_path / "little", max_memory=1))
    verbs.pack(source, asked, WriteOptions(tmp_path / "torch", device="torch:cpu"))
    verbs.pack(source, asked, WriteOptions(tmp_path / "strips", sizes=Sizes(strip=4096)))
    for name in ("many", "little", "torch", "strips"):
        assert files_of(tmp_path / name) == reference, name


def test_neither_place_nor_name_of_a_calibration_is_in_the_output(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source = make_checkpoint()
    first = calibrate(source)
    second = tmp_path / "elsewhere" / "other name.safetensors"
    second.parent.mkdir()
    second.write_bytes(first.read_bytes())
    pack_static(source, tmp_path / "one", first, kv_cache=True)
    pack_static(source, tmp_path / "two", second, kv_cache=True)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    assert not any(
        b"elsewhere" in data or str(tmp_path).encode() in data for data in files_of(tmp_path / "two").values()
    )
    recipe = read_manifest(tmp_path / "one" / "fp8pack.json").recipe
    assert recipe["calibration"] == f"blake3:{blake3(first.read_bytes()).hexdigest()}"


def interrupt(source: Path, asked: Request, options: WriteOptions, monkeypatch: pytest.MonkeyPatch, line: int) -> None:
    """Pack in small bands, each journalled at once, until the journal is to get this line, and no further."""
    genuine, seen = Journal._append, []

    def dying(journal: Journal, entry: dict[str, Any]) -> None:
        seen.append(entry)
        if len(seen) >= line:
            raise KeyboardInterrupt
        genuine(journal, entry)

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "_append", dying)
        with pytest.raises(KeyboardInterrupt):
            verbs.pack(source, asked, replace(options, sizes=Sizes(band=1 << 16, checkpoint=1)))


@pytest.mark.slow
@pytest.mark.parametrize("line", [2, 3, 8, 20, 30])
@pytest.mark.parametrize("method", ["modelopt", "compressed-tensors"])
def test_an_interrupted_pack_ends_in_the_same_bytes(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, line: int
) -> None:
    source = make_checkpoint(shards=2)
    asked = Request(scheme="FP8", calibration=calibrate(source), kv_cache=True, quant_method=method)
    sizes = Sizes(band=1 << 16)
    verbs.pack(source, asked, WriteOptions(tmp_path / "whole", sizes=sizes))
    interrupt(source, asked, WriteOptions(output=tmp_path / "out", workers=1), monkeypatch, line)
    assert not (tmp_path / "out").exists()
    facts = verbs.pack(source, asked, WriteOptions(tmp_path / "out", sizes=sizes))
    assert facts.resumed_nbytes > 0 or line < 20
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_a_deadline_leaves_work_that_the_same_command_finishes(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint()
    asked = Request(scheme="FP8", calibration=calibrate(source), kv_cache=True)
    verbs.pack(source, asked, WriteOptions(tmp_path / "whole"))
    with pytest.raises(DeadlineError):
        verbs.pack(source, asked, WriteOptions(tmp_path / "out", deadline=0.0))
    verbs.pack(source, asked, WriteOptions(tmp_path / "out"))
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_an_unfinished_pack_of_another_calibration_is_another_recipe(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_checkpoint()
    asked = Request(scheme="FP8", calibration=calibrate(source))
    changed = Request(scheme="FP8", calibration=calibrate(source, "changed", llama_sites(factor=2.0)))
    options = WriteOptions(output=tmp_path / "out")
    interrupt(source, asked, WriteOptions(output=tmp_path / "out", workers=1), monkeypatch, 8)
    for other in (changed, Request(scheme="FP8", calibration=asked.calibration, margin=1)):
        with pytest.raises(OutputError, match="another recipe"):
            verbs.pack(source, other, options)
    verbs.pack(source, changed, WriteOptions(tmp_path / "out", resume=False))
    found = stored(tmp_path / "out")["model.layers.0.mlp.down_proj.input_scale"]
    assert found == ("F32", (), scale_by_hand(260.0))


def test_a_finished_pack_of_another_calibration_is_not_complete(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source = make_checkpoint()
    calibration = calibrate(source)
    options = WriteOptions(output=tmp_path / "out")
    first = pack_static(source, tmp_path / "out", calibration, kv_cache=True)
    assert pack_static(source, tmp_path / "out", calibration, kv_cache=True).already_complete
    others: list[dict[str, Any]] = [
        {"calibration": calibrate(source, "changed", llama_sites(factor=2.0)), "kv_cache": True},
        {"calibration": calibration, "kv_cache": True, "margin": 1},
        {"calibration": calibration, "kv_cache": True, "warmup": 1},
        {"calibration": calibration, "kv_cache": True, "percentile": 99.9},
        {"calibration": calibration},
        {"calibration": calibration, "kv_cache": True, "quant_method": "compressed-tensors"},
    ]
    for other in others:
        with pytest.raises(OutputError, match="exists"):
            verbs.pack(source, Request(scheme="FP8", **other), options)
    assert read_manifest(tmp_path / "out" / "fp8pack.json").root == first.root


# Reading it again.


@pytest.mark.parametrize("method", ["modelopt", "compressed-tensors", "fp8pack"])
def test_load_packed_gives_the_scales(make_checkpoint: MakeCheckpoint, tmp_path: Path, method: str) -> None:
    source = make_checkpoint(shards=2)
    pack_static(source, tmp_path / "out", calibrate(source), kv_cache=True, quant_method=method)
    loaded, found = fp8pack.load_packed(tmp_path / "out"), stored(tmp_path / "out")
    assert set(loaded) == llama_tensors().keys()
    for name in packed_names(llama_tensors()):
        packed = loaded[name]
        assert isinstance(packed, fp8pack.PackedTensor)
        module = name.removesuffix(".weight")
        _, shape, data = found[f"{module}.input_scale"]
        assert packed.input_scale is not None
        assert (packed.input_scale.dtype, tuple(packed.input_scale.shape)) == (torch.float32, shape)
        assert packed.input_scale.numpy().tobytes() == data == scale_by_hand(amax_of(module))
    points = {f"model.layers.{i}.self_attn.{kind}" for i in range(2) for kind in "kv"}
    assert loaded.kv_scales.keys() == points
    for point in points:
        assert loaded.kv_scales[point].numpy().tobytes() == scale_by_hand(amax_of(point))
    for module, parts in (("self_attn.qkv_proj", "self_attn.k_proj"), ("mlp.gate_up_proj", "mlp.up_proj")):
        fused = loaded.fused(f"model.layers.1.{module}")
        assert fused.input_scale is not None
        assert fused.input_scale.numpy().tobytes() == scale_by_hand(amax_of(f"model.layers.1.{parts}"))
        assert fused.input_scale.shape == loaded[f"model.layers.1.{parts}.weight"].input_scale.shape
    alone = loaded.fused("model.layers.0.self_attn.qkv_proj").dequantize()
    parts = [loaded[f"model.layers.0.self_attn.{leaf}_proj.weight"].dequantize() for leaf in "qkv"]
    assert torch.equal(alone, torch.cat(parts))


def test_kv_scales_alone_give_no_input_scale(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint()
    pack_static(source, tmp_path / "out", calibrate(source), "FP8_DYNAMIC", kv_cache=True)
    loaded = fp8pack.load_packed(tmp_path / "out")
    assert len(loaded.kv_scales) == 4
    assert loaded["model.layers.0.self_attn.k_proj.weight"].input_scale is None
    assert loaded.fused("model.layers.0.self_attn.qkv_proj").input_scale is None


def test_inspect_reads_it_and_measures_it(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint(shards=2)
    pack_static(source, tmp_path / "out", calibrate(source), kv_cache=True)
    facts = fp8pack.inspect(tmp_path / "out", against=source)
    assert facts.recipe["calibration"].startswith("blake3:")
    assert facts.totals.num_packed == 14
    assert facts.totals.sqnr_min > 25
    assert facts.totals.nbytes == sum(len(data) for _, _, data in stored(tmp_path / "out").values())


SCALES = ("model.layers.0.mlp.up_proj.input_scale", "model.layers.1.self_attn.k_proj.k_scale")


@pytest.mark.parametrize("name", SCALES)
@pytest.mark.parametrize("change", ["shape", "dtype", "gone", "renamed", "one more"])
def test_inspect_finds_scales_that_were_edited(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, change: str, name: str
) -> None:
    source = make_checkpoint(llama_tensors())
    pack_static(source, tmp_path / "out", calibrate(source), kv_cache=True)
    path = tmp_path / "out" / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    entry = header[name]
    match change:
        case "shape":
            entry["shape"] = [1]
        case "dtype":
            entry["dtype"] = "I32"
        case "gone":
            header = {key: value for key, value in header.items() if key != name}
            header["gap"] = entry | {"dtype": "U8", "shape": [4]}
        case "renamed":
            header[name.replace("model.", "")] = header.pop(name)
        case _:
            header["extra.input_scale"] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    edited = json.dumps(header, separators=(",", ":")).encode()
    assert len(edited) <= length
    path.write_bytes(raw[:8] + edited.ljust(length) + raw[8 + length :])
    with pytest.raises(InputError, match="changed after packing"):
        fp8pack.inspect(tmp_path / "out")


def test_a_single_file_takes_a_calibration_as_well(tmp_path: Path) -> None:
    save_file(llama_tensors(), tmp_path / "x.safetensors")
    calibration = calibrate(tmp_path / "x.safetensors")
    facts = pack_static(tmp_path / "x.safetensors", tmp_path / "y.safetensors", calibration, kv_cache=True)
    assert facts.num_packed == 14
    found = load_file(tmp_path / "y.safetensors") if hasattr(np, "float8_e4m3fn") else stored(tmp_path)
    assert "model.layers.0.self_attn.v_proj.v_scale" in found
    loaded = fp8pack.load_packed(tmp_path / "y.safetensors")
    assert len(loaded.kv_scales) == 4
    assert loaded["model.layers.0.mlp.up_proj.weight"].input_scale.item() == np.float32(40) / np.float32(448)
