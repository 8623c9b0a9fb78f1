"""Packing whole checkpoints: the bytes against the oracle, the same bytes everywhere, nothing lost."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import oracle
import pytest
import verbs
from checkpoints import MakeCheckpoint, Tensors, llama_config, llama_tensors, random_weight
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

import fp8pack
from fp8pack.checkpoint.manifest_schema import Manifest, PackedEntry, read_manifest
from fp8pack.checkpoint.source import ShardReader, open_checkpoint
from fp8pack.errors import InputError, OutputError
from fp8pack.modelfacts.patterns import Pattern
from fp8pack.numerics.formats import parse_format
from fp8pack.numerics.granularity import parse_granularity
from fp8pack.numerics.rounding import ScaleRounding
from fp8pack.numerics.scaling import decode_e8m0
from fp8pack.packing import bands, pack
from fp8pack.packing.options import WriteOptions
from fp8pack.planning.recipe import Request
from fp8pack.planning.sizes import Sizes

GRANULARITIES = ("tensor", "channel", "group:64", "block:128x128", "block:48x80", "mx")


def stored_bytes(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Dtype, shape and bytes of every tensor of a checkpoint."""
    opened = open_checkpoint(folder)
    found = {}
    for spec in opened.specs:
        data = bytearray(spec.nbytes)
        reader = ShardReader(opened.directory / spec.file)
        reader.readinto(memoryview(data), spec.begin)
        reader.close()
        found[spec.name] = (spec.dtype, spec.shape, bytes(data))
    return found


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def request(format: str = "e4m3", granularity: str = "block:128x128", **changes: Any) -> Request:
    rounding = ScaleRounding.UP if granularity == "mx" else None
    typed = {"format": parse_format(format), "granularity": parse_granularity(granularity), "scale_rounding": rounding}
    return Request(**{"quant_method": "fp8pack", **typed, **changes})


def expected_scales(entry: PackedEntry, data: bytes) -> NDArray[np.float32]:
    grid = (-(-entry.shape[0] // entry.block[0]), -(-entry.shape[1] // entry.block[1]))
    if entry.scale_inv.dtype == "U8":
        return decode_e8m0(np.frombuffer(data, np.uint8)).reshape(grid)
    return np.frombuffer(data, np.float32).reshape(grid)


def ragged_tensors(dtype: Any) -> Tensors:
    """Odd shapes: one row, one column, ragged edges, zeros, tiny and huge values."""
    shapes = {"a": (1, 300), "b": (300, 1), "c": (130, 259), "d": (256, 512), "e": (7, 5)}
    tensors = {
        f"model.layers.0.mlp.odd_{name}.weight": random_weight(s, i, dtype)
        for i, (name, s) in enumerate(shapes.items())
    }
    tensors["model.layers.0.mlp.odd_zero.weight"] = np.zeros((64, 64), dtype)
    extreme = random_weight((64, 96), 9, dtype)
    extreme[0, 0], extreme[1, 1], extreme[2, 2] = float(ml_dtypes.finfo(dtype).max) / 2, 1e-6, -0.0
    return tensors | {"model.layers.0.mlp.odd_extreme.weight": extreme}


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32], ids=["BF16", "F16", "F32"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("format", ["e4m3", "e5m2"])
def test_every_byte_equals_the_oracle(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, format: str, granularity: str, dtype: Any
) -> None:
    tensors = ragged_tensors(dtype)
    facts = verbs.pack(make_checkpoint(tensors), request(format, granularity), WriteOptions(tmp_path / "out"))
    assert facts.num_packed == len(tensors)
    stored, manifest = stored_bytes(tmp_path / "out"), read_manifest(tmp_path / "out" / "fp8pack.json")
    for name, weight in tensors.items():
        entry = manifest.tensors[name]
        assert isinstance(entry, PackedEntry)
        rounding = "up" if granularity == "mx" else "none"
        payload, scales = oracle.quantize(weight.astype(np.float32), format, granularity, rounding)
        assert stored[name][2] == payload.tobytes(), name
        np.testing.assert_array_equal(expected_scales(entry, stored[entry.scale_inv.tensor][2]), scales)
        assert entry.amax == np.abs(weight.astype(np.float32)).max()


def test_fused_members_share_a_tensor_wide_scale(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    tensors = llama_tensors(1)
    asked = Request(granularity=parse_granularity("tensor"))
    verbs.pack(make_checkpoint(tensors, shards=3), asked, WriteOptions(tmp_path / "out"))
    stored = stored_bytes(tmp_path / "out")
    for group in (["q", "k", "v"], ["gate", "up"]):
        part = "mlp" if "up" in group else "self_attn"
        names = [f"model.layers.0.{part}.{leaf}_proj.weight" for leaf in group]
        amax = max(float(np.abs(tensors[name].astype(np.float32)).max()) for name in names)
        for name in names:
            payload, scales = oracle.quantize(tensors[name].astype(np.float32), "e4m3", "tensor", amax=amax)
            assert stored[name][2] == payload.tobytes()
            assert stored[f"{name}_scale"] == ("F32", (), scales.tobytes())


@pytest.mark.parametrize("granularity", ["tensor", "channel", "block:128x128", "mx"])
def test_workers_strips_and_device_change_no_byte(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, granularity: str
) -> None:
    source = make_checkpoint(
        llama_tensors() | {"model.layers.0.mlp.odd.weight": random_weight((700, 130), 5)}, shards=2
    )
    asked = request("e4m3", granularity)
    verbs.pack(source, asked, WriteOptions(tmp_path / "one", workers=1))
    reference = files_of(tmp_path / "one")
    verbs.pack(source, asked, WriteOptions(tmp_path / "many", workers=5))
    verbs.pack(source, asked, WriteOptions(tmp_path / "little", max_memory=1))
    verbs.pack(source, asked, WriteOptions(tmp_path / "torch", device="torch:cpu"))
    verbs.pack(source, asked, WriteOptions(tmp_path / "strips", sizes=Sizes(strip=4096)))
    for name in ("many", "little", "torch", "strips"):
        assert files_of(tmp_path / name) == reference, name


def test_bands_cut_a_tensor_anywhere_but_change_only_its_digest(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source = make_checkpoint()
    verbs.pack(source, request(granularity="group:64"), WriteOptions(tmp_path / "whole"))
    options = WriteOptions(tmp_path / "cut", sizes=Sizes(band=3000))
    verbs.pack(source, request(granularity="group:64"), options)
    assert stored_bytes(tmp_path / "cut") == stored_bytes(tmp_path / "whole")
    entry = read_manifest(tmp_path / "cut" / "fp8pack.json").tensors["model.layers.0.mlp.up_proj.weight"]
    assert isinstance(entry, PackedEntry)
    assert entry.band_rows == 5


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["tensor", "group:64", "block:128x128", "block:48x80", "mx"])
def test_very_long_rows_are_cut_into_columns_and_no_byte_changes(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, granularity: str
) -> None:
    source = make_checkpoint(llama_tensors() | {"model.layers.0.mlp.odd.weight": random_weight((260, 1000), 5)})
    asked = request("e4m3", granularity)
    verbs.pack(source, asked, WriteOptions(tmp_path / "whole"))
    verbs.pack(source, asked, WriteOptions(tmp_path / "cut", sizes=Sizes(band=300, granule=600)))
    assert stored_bytes(tmp_path / "cut") == stored_bytes(tmp_path / "whole")
    entry = read_manifest(tmp_path / "cut" / "fp8pack.json").tensors["model.layers.0.mlp.odd.weight"]
    assert isinstance(entry, PackedEntry)
    assert entry.band_cols is not None


def test_every_source_tensor_is_packed_or_copied_byte_for_byte(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    extra = {"model.layers.0.mlp.gate.e_score": np.arange(7, dtype=np.int64), "empty": np.zeros((0, 4), np.float32)}
    tensors = llama_tensors() | extra
    facts = fp8pack.pack(make_checkpoint(tensors, shards=2), tmp_path / "out")
    stored, kept = stored_bytes(tmp_path / "out"), {entry.name for entry in facts.kept}
    packed = {name for name, (dtype, _, _) in stored.items() if dtype == "F8_E4M3"}
    assert kept | packed == tensors.keys()
    assert all(stored[name][2] == tensors[name].tobytes() for name in kept)
    assert stored.keys() - tensors.keys() == {f"{name}_scale_inv" for name in packed}


def test_side_files_are_carried_over_and_weights_of_other_kinds_are_not(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source = make_checkpoint()
    carried = {
        "tokenizer.json": b"{}",
        "empty.txt": b"",
        "chat_template.jinja": "é".encode(),
        "LICENSE": b"x" * 5000,
        "code/model.py": b"1",
    }
    left = {
        "pytorch_model.bin": b"pickle",
        "original/consolidated.00.pth": b"x",
        "optimizer.pt": b"x",
        "model.gguf": b"x",
    }
    for name, content in (carried | left).items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(content)
    facts = fp8pack.pack(source, tmp_path / "out")
    for name, content in carried.items():
        assert (tmp_path / "out" / name).read_bytes() == content
    assert {entry.file: entry.size for entry in facts.skipped} == {name: len(left[name]) for name in left}
    assert not any((tmp_path / "out" / name).exists() for name in left)
    fp8pack.pack(source, tmp_path / "more", copy=("*.gguf",))
    assert (tmp_path / "more" / "model.gguf").read_bytes() == b"x"


def test_config_keeps_every_byte_and_announces_the_quantization(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source = make_checkpoint()
    before = (source / "config.json").read_text()
    fp8pack.pack(source, tmp_path / "out")
    after = (tmp_path / "out" / "config.json").read_text()
    assert after.startswith(before.rstrip().removesuffix("}").rstrip())
    assert json.loads(after)["quantization_config"] == {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head"],
    }


def test_powers_of_two_are_announced_as_deepseek_announces_them(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    asked = Request(scheme="FP8_BLOCK", scale_rounding=ScaleRounding.UP)
    verbs.pack(make_checkpoint(), asked, WriteOptions(tmp_path / "out"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["scale_fmt"]) == ("fp8", "ue8m0")
    data = stored_bytes(tmp_path / "out")["model.layers.0.mlp.up_proj.weight_scale_inv"][2]
    assert (np.frexp(np.frombuffer(data, np.float32))[0] == 0.5).all()


def test_the_index_lists_every_tensor_with_its_file(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    fp8pack.pack(make_checkpoint(shards=3), tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    found, total = {}, 0
    for path in sorted((tmp_path / "out").glob("*.safetensors")):
        with safe_open(path, framework="numpy") as opened:
            found |= {name: path.name for name in opened.keys()}  # noqa: SIM118
        total += sum(len(data) for _, _, data in stored_bytes(path).values())
    assert index["weight_map"] == found
    assert index["metadata"]["total_size"] == total


def test_a_limit_on_the_shard_size_changes_files_and_no_tensor(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint()
    fp8pack.pack(source, tmp_path / "one")
    fp8pack.pack(source, tmp_path / "many", max_shard_size=300_000)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    assert stored_bytes(tmp_path / "many") == stored_bytes(tmp_path / "one")


def test_a_single_file_gives_a_single_file(tmp_path: Path) -> None:
    save_file(llama_tensors(), tmp_path / "x.safetensors")
    before = (tmp_path / "x.safetensors").read_bytes()
    facts = fp8pack.pack(tmp_path / "x.safetensors")
    assert facts.output == tmp_path / "x-FP8-block.safetensors"
    assert {path.name for path in tmp_path.iterdir()} == {
        "x.safetensors",
        "x-FP8-block.safetensors",
        "x-FP8-block.fp8pack.json",
    }
    assert (tmp_path / "x.safetensors").read_bytes() == before
    assert fp8pack.pack(tmp_path / "x.safetensors").already_complete


def test_a_diffusion_model_is_packed_for_comfyui(tmp_path: Path) -> None:
    """It has no architecture that another engine knows; what is asked for goes before."""
    names = [f"double_blocks.0.img_attn.{leaf}.weight" for leaf in ("qkv", "proj")]
    tensors = {name: random_weight((256, 256)) for name in (*names, "img_in.weight")}
    save_file(tensors, tmp_path / "flux.safetensors")
    result = fp8pack.pack(tmp_path / "flux.safetensors")
    assert result.scheme is not None
    assert (result.scheme.name, result.recipe["quant_method"]) == ("FP8_SCALED", "comfyui")
    assert result.output == tmp_path / "flux-fp8_scaled.safetensors"
    assert "ComfyUI" in result.scheme.reason
    e5m2 = fp8pack.pack(tmp_path / "flux.safetensors", format="e5m2")
    assert (e5m2.recipe["quant_method"], e5m2.output.name) == ("comfyui", "flux-fp8_e5m2_scaled.safetensors")
    block = fp8pack.pack(tmp_path / "flux.safetensors", granularity="block:128x128")
    assert block.recipe["quant_method"] == "fp8"
    assert fp8pack.pack(tmp_path / "flux.safetensors", scheme="fp8-scaled").already_complete


def test_the_manifest_is_its_own_proof(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    facts = fp8pack.pack(make_checkpoint(shards=2), tmp_path / "out")
    document = json.loads((tmp_path / "out" / "fp8pack.json").read_bytes())
    assert document["root"] == oracle.root_of(document) == facts.root
    manifest = Manifest.model_validate(document)
    assert set(manifest.files) | {"fp8pack.json"} == {path.name for path in (tmp_path / "out").iterdir()}
    assert all((tmp_path / "out" / name).stat().st_size == entry.size for name, entry in manifest.files.items())


def test_data_starts_at_a_page_and_files_have_the_umasks_mode(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    fp8pack.pack(make_checkpoint(), tmp_path / "out")
    raw = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert (8 + int.from_bytes(raw[:8], "little")) % 4096 == 0
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o644}


def test_the_same_command_again_leaves_a_finished_output_alone(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint()
    first = fp8pack.pack(source, tmp_path / "out")
    before = (tmp_path / "out" / "fp8pack.json").stat().st_mtime_ns
    again = fp8pack.pack(source, tmp_path / "out")
    assert again.already_complete
    assert again.root == first.root
    assert (tmp_path / "out" / "fp8pack.json").stat().st_mtime_ns == before
    for asked, options in (
        (Request(scheme="FP8_DYNAMIC"), WriteOptions(output=tmp_path / "out")),
        (Request(), WriteOptions(output=tmp_path / "out", max_shard_size=300_000)),
    ):
        with pytest.raises(OutputError, match="exists"):
            verbs.pack(source, asked, options)


def test_two_fine_tunes_of_one_base_have_two_fingerprints(make_checkpoint: MakeCheckpoint) -> None:
    tensors = llama_tensors()
    first = open_checkpoint(make_checkpoint(tensors)).fingerprint
    tensors["model.layers.1.mlp.up_proj.weight"][-1, -1] += 1
    assert open_checkpoint(make_checkpoint(tensors, name="other")).fingerprint != first


def test_offenders_are_named_and_the_flag_that_mends_them_reuses_the_rest(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    tensors = llama_tensors()
    bad = ["model.layers.0.mlp.down_proj.weight", "model.layers.1.self_attn.o_proj.weight"]
    for name in bad:
        tensors[name][3, 5] = np.nan
    source, options = make_checkpoint(tensors, shards=3), WriteOptions(output=tmp_path / "out")
    for granularity in ("tensor", "block:128x128"):
        asked = Request(granularity=parse_granularity(granularity))
        with pytest.raises(InputError) as caught:
            verbs.pack(source, asked, WriteOptions(tmp_path / granularity[:5]))
        assert all(f"--ignore {name}" in caught.value.command_line for name in bad)
    asked = Request(granularity=parse_granularity("block:128x128"))
    with pytest.raises(InputError):
        verbs.pack(source, asked, options)
    asked = Request(granularity=parse_granularity("block:128x128"), ignore=tuple(map(Pattern, bad)))
    facts = verbs.pack(source, asked, options)
    assert facts.resumed_nbytes > 0
    assert {entry.name for entry in facts.kept} >= set(bad)


def test_a_group_with_a_nan_gets_no_scale_before_the_nan_is_mended(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """The values that change lie where the fingerprint does not look, so that the run goes on."""
    tensors, name = llama_tensors(), "model.layers.0.self_attn.q_proj.weight"
    mended = tensors[name].copy()
    mended[40:60] *= 30
    tensors[name] = mended.copy()
    tensors[name][50, 100] = np.nan
    source, asked = make_checkpoint(tensors), Request(granularity=parse_granularity("tensor"))
    with pytest.raises(InputError, match="1 weight contains a NaN or infinity"):
        verbs.pack(source, asked, WriteOptions(tmp_path / "out"))
    save_file(tensors | {name: mended}, source / "model.safetensors", {"format": "pt"})
    facts = verbs.pack(source, asked, WriteOptions(tmp_path / "out"))
    assert facts.resumed_nbytes > 0
    assert facts.root == verbs.pack(source, asked, WriteOptions(tmp_path / "fresh")).root
    stored = stored_bytes(tmp_path / "out")
    assert len({stored[f"model.layers.0.self_attn.{leaf}_proj.weight_scale"][2] for leaf in "qkv"}) == 1


@pytest.mark.parametrize("change", ["config.json", "tokenizer.json", "a new file"])
def test_a_changed_side_file_makes_an_output_incomplete(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, change: str
) -> None:
    source = make_checkpoint()
    (source / "tokenizer.json").write_text("{}")
    fp8pack.pack(source, tmp_path / "out")
    (source / change).write_text(json.dumps(llama_config() | {"eos_token_id": 7}))
    with pytest.raises(OutputError, match="exists"):
        fp8pack.pack(source, tmp_path / "out")


def test_hub_snapshots_are_packed_into_the_current_directory(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_checkpoint()
    cache = tmp_path / "hub" / "models--org--tiny-model"
    snapshot = cache / "snapshots" / "abc"
    (cache / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in source.iterdir():
        path.rename(cache / "blobs" / f"digest-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/digest-{path.name}")
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    facts = fp8pack.pack(snapshot)
    assert facts.output == work / "tiny-model-FP8-block"
    assert facts.model == "tiny-model"


def test_schemes_write_what_their_engines_read(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint(config=llama_config("LlamaForCausalLM"))
    for scheme, suffix, shape, dtype in (
        ("FP8_DYNAMIC", "weight_scale", (512, 1), "F32"),
        ("W8A16", "weight_scale", (512, 1), "F32"),
        ("MXFP8", "weight_scale", (512, 8), "U8"),
        ("FP8_BLOCK", "weight_scale_inv", (4, 2), "F32"),
    ):
        fp8pack.pack(source, tmp_path / scheme, scheme=scheme)
        stored = stored_bytes(tmp_path / scheme)
        assert stored[f"model.layers.0.mlp.up_proj.{suffix}"][:2] == (dtype, shape)


def test_pack_is_what_the_package_exports() -> None:
    assert fp8pack.pack is pack.pack
    assert bands.SAMPLE_ROWS > 0


@pytest.mark.parametrize("damage", ["config.json", "header", "size"])
def test_a_damaged_output_is_not_called_complete(damage: str, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source, out = make_checkpoint(), tmp_path / "out"
    fp8pack.pack(source, out)
    path = out / ("config.json" if damage == "config.json" else "model.safetensors")
    data = bytearray(path.read_bytes())
    data[20] ^= 1
    path.write_bytes(data[:-1] if damage == "size" else data)
    with pytest.raises(OutputError, match=f"is of the same recipe, but damaged: {path.name}"):
        fp8pack.pack(source, out)
    fp8pack.pack(source, out, overwrite=True)
    assert fp8pack.pack(source, out).already_complete
