"""FP8 checkpoints back to floats: every byte against torch's own formula, in any layout, whatever ends the run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import oracle
import pytest
import torch
import verbs
from checkpoints import (
    MakeCheckpoint,
    Tensors,
    llama_config,
    llama_tensors,
    random_weight,
    read_tensors,
    write_model,
    write_shard,
)
from numpy.typing import NDArray
from safetensors import safe_open

import fp8pack
from fp8pack.errors import Fp8PackError, InputError, OutputError, RecipeError, SpaceError
from fp8pack.modelfacts.spec import TORCH_NAMES
from fp8pack.numerics.formats import parse_format
from fp8pack.numerics.granularity import parse_granularity
from fp8pack.numerics.rounding import ScaleRounding
from fp8pack.packing.options import WriteOptions
from fp8pack.planning.recipe import Request
from fp8pack.planning.sizes import Sizes

BF16, E4M3 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}
SHAPES = {
    "model.layers.0.mlp.down_proj": (256, 384),
    "model.layers.0.self_attn.kv_a_proj_with_mqa": (576, 256),
    "model.layers.0.mlp.experts.0.gate_proj": (200, 328),
    "model.layers.0.mlp.experts.1.gate_proj": (1, 130),
    "model.layers.1.self_attn.o_proj": (129, 1),
    "model.layers.61.mlp.down_proj": (130, 127),
    "model.layers.61.eh_proj": (64, 64),
}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def deepseek(shapes: dict[str, tuple[int, int]] | None = None, seed: int = 0) -> Tensors:
    """FP8 weights of all finite bytes with block scales, and what is no linear."""
    random = np.random.default_rng(seed)
    codes = np.array([code for code in range(256) if code & 0x7F != 0x7F], np.uint8)
    tensors: Tensors = {"model.embed_tokens.weight": random_weight((32, 64), seed)}
    for name, (n, k) in (shapes or SHAPES).items():
        tensors[f"{name}.weight"] = random.choice(codes, (n, k)).view(E4M3)
        scales = np.exp(random.normal(-7, 2, (-(-n // 128), -(-k // 128)))).astype(np.float32)
        tensors[f"{name}.weight_scale_inv"] = scales
    return tensors | {
        "model.layers.0.mlp.gate.e_score_correction_bias": random_weight((8,), 1, np.float32),
        "model.norm.weight": random_weight((64,), 2),
        "lm_head.weight": random_weight((32, 64), 3),
    }


def cast(weight: NDArray[Any], scale_inv: NDArray[np.float32], dtype: torch.dtype) -> torch.Tensor:
    """DeepSeek's own formula in torch: weight.to(float32) * scale, over blocks of 128 x 128, then rounded."""
    n, k = weight.shape
    values = torch.from_numpy(weight.view(np.uint8).copy()).view(torch.float8_e4m3fn).to(torch.float32)
    spread = torch.from_numpy(scale_inv.copy()).repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k]
    return (values * spread).to(dtype)


def check(found: Tensors, source: Tensors, dtype: str = "bfloat16") -> None:
    """Every FP8 weight is its cast, everything else is as it was, and there is nothing more."""
    weights = {name for name, tensor in source.items() if tensor.dtype == E4M3}
    scales = {f"{name}_scale_inv" for name in weights}
    assert set(found) == set(source) - scales
    for name, tensor in found.items():
        if name in weights:
            expected = cast(source[name], source[f"{name}_scale_inv"], DTYPES[dtype]).view(torch.uint8).numpy()
            assert str(tensor.dtype) == dtype, name
            np.testing.assert_array_equal(tensor.view(np.uint8), expected, err_msg=name)
        else:
            assert (tensor.dtype, tensor.tobytes()) == (source[name].dtype, source[name].tobytes()), name


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """DeepSeek's convention, in three shards: a weight and its scales mostly lie apart."""
    config = llama_config(layers=61) | {"quantization_config": BLOCKS}
    return write_model(tmp_path / "model", deepseek(), config, shards=3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_byte_is_that_of_the_formula(dtype: str, checkpoint: Path, tmp_path: Path) -> None:
    """Multi-token-prediction layers, which DeepSeek's own script keeps, are there too."""
    facts = fp8pack.unpack(checkpoint, tmp_path / "out", dtype=dtype)
    assert facts.num_unpacked == len(SHAPES)
    check(read_tensors(tmp_path / "out"), deepseek(), dtype)


@pytest.mark.slow
def test_workers_strips_bands_and_shards_change_no_byte(checkpoint: Path, tmp_path: Path) -> None:
    fp8pack.unpack(checkpoint, tmp_path / "one", workers=1)
    fp8pack.unpack(checkpoint, tmp_path / "many", workers=4, max_shard_size=100_000)
    rows, columns = Sizes(band=2000, strip=700), Sizes(band=99, granule=100, strip=700)
    verbs.unpack(checkpoint, options=WriteOptions(tmp_path / "little", max_memory=1, sizes=rows))
    verbs.unpack(checkpoint, options=WriteOptions(tmp_path / "columns", workers=3, sizes=columns))
    for name in ("one", "many", "little", "columns"):
        check(read_tensors(tmp_path / name), deepseek())


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group:64", "block:48x80", "mx"])
@pytest.mark.parametrize("format", ["e4m3", "e5m2"])
def test_what_was_packed_comes_back_as_its_values(format: str, granularity: str, tmp_path: Path) -> None:
    """Of our own packs, in every format and granularity, ragged edges included."""
    weights = {f"model.layers.0.mlp.odd_{i}.weight": random_weight(shape, i) for i, shape in enumerate(SHAPES.values())}
    source = write_model(tmp_path / "model", weights, llama_config())
    rounding = ScaleRounding.UP if granularity == "mx" else None
    asked = Request(
        format=parse_format(format),
        granularity=parse_granularity(granularity),
        quant_method="fp8pack",
        scale_rounding=rounding,
    )
    verbs.pack(source, asked, WriteOptions(tmp_path / "packed"))
    fp8pack.unpack(tmp_path / "packed", tmp_path / "out")
    found = read_tensors(tmp_path / "out")
    assert set(found) == set(weights)
    for name, weight in weights.items():
        codes, scales = oracle.quantize(
            weight.astype(np.float32), format, granularity, "up" if granularity == "mx" else "none"
        )
        region = oracle.region_of(granularity, weight.shape)
        values = codes.view(oracle.ELEMENT[format][0]).astype(np.float32) * oracle.spread(scales, region, weight.shape)
        np.testing.assert_array_equal(found[name].view(np.uint16), values.astype(BF16).view(np.uint16), err_msg=name)


def test_config_and_index_speak_of_no_quantization_any_more(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    (checkpoint / "tokenizer.json").write_text("{}")
    facts = fp8pack.unpack(checkpoint, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == llama_config(layers=61)
    assert list(config) == list(llama_config(layers=61))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    found = read_tensors(tmp_path / "out")
    assert set(index["weight_map"]) == set(found)
    assert not any("scale" in name for name in index["weight_map"])
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()
    assert [entry.file for entry in facts.skipped] == ["hf_quant_config.json", "model.safetensors.index.json"][:1]


def test_a_quantization_announced_in_a_section_goes_too(tmp_path: Path) -> None:
    config = {"model_type": "x", "text_config": llama_config() | {"quantization_config": BLOCKS}, "vision_config": {}}
    source = write_model(tmp_path / "model", deepseek(), config)
    fp8pack.unpack(source, tmp_path / "out")
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert found == {"model_type": "x", "text_config": llama_config(), "vision_config": {}}


def test_an_unpacked_checkpoint_can_be_packed_again_to_the_same_bytes(tmp_path: Path) -> None:
    """Block scales of FP8 weights that reach 448 in every block come back exactly."""
    weights = {f"model.layers.0.mlp.odd_{i}.weight": random_weight((256, 128), i) for i in range(3)}
    source = write_model(tmp_path / "model", weights, llama_config())
    asked = Request(scheme="FP8_BLOCK")
    verbs.pack(source, asked, WriteOptions(tmp_path / "packed"))
    fp8pack.unpack(tmp_path / "packed", tmp_path / "floats", dtype="float32")
    verbs.pack(tmp_path / "floats", asked, WriteOptions(tmp_path / "again"))
    first, second = read_tensors(tmp_path / "packed"), read_tensors(tmp_path / "again")
    assert {name: tensor.tobytes() for name, tensor in first.items()} == {
        name: tensor.tobytes() for name, tensor in second.items()
    }


# Values that a dtype does not hold.


def test_a_value_that_float16_does_not_reach_is_refused_and_bfloat16_holds_it(tmp_path: Path) -> None:
    tensors = deepseek({"model.layers.0.mlp.down_proj": (128, 128), "model.layers.1.mlp.down_proj": (128, 128)})
    tensors["model.layers.1.mlp.down_proj.weight_scale_inv"][0, 0] = 65520 / 448 * 1.0001
    source = write_model(tmp_path / "model", tensors, llama_config() | {"quantization_config": BLOCKS})
    with pytest.raises(InputError) as caught:
        fp8pack.unpack(source, tmp_path / "half", dtype="float16")
    assert "model.layers.1.mlp.down_proj.weight" in str(caught.value)
    assert "model.layers.0.mlp.down_proj.weight" not in str(caught.value)
    assert not (tmp_path / "half").exists()
    fp8pack.unpack(source, tmp_path / "out", dtype="bfloat16")
    check(read_tensors(tmp_path / "out"), tensors)


def test_the_largest_values_that_round_to_a_finite_float16_are_kept(tmp_path: Path) -> None:
    tensors = deepseek({"model.layers.0.mlp.down_proj": (128, 128)})
    scale = np.float32(np.nextafter(np.float32(65520), np.float32(0)) / 448)
    assert np.float32(448) * scale < 65520
    tensors["model.layers.0.mlp.down_proj.weight_scale_inv"][0, 0] = scale
    source = write_model(tmp_path / "model", tensors, llama_config() | {"quantization_config": BLOCKS})
    fp8pack.unpack(source, tmp_path / "out", dtype="float16")
    found = read_tensors(tmp_path / "out")
    check(found, tensors, "float16")
    assert np.abs(found["model.layers.0.mlp.down_proj.weight"]).max() == 65504


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_product_beyond_the_dtype_is_refused_and_never_an_infinity(dtype: str, tmp_path: Path) -> None:
    tensors = deepseek({"model.layers.0.mlp.down_proj": (128, 128)})
    tensors["model.layers.0.mlp.down_proj.weight_scale_inv"][0, 0] = 3e38
    source = write_model(tmp_path / "model", tensors, llama_config() | {"quantization_config": BLOCKS})
    with pytest.raises(InputError, match=r"model\.layers\.0\.mlp\.down_proj\.weight"):
        fp8pack.unpack(source, tmp_path / "out", dtype=dtype)
    assert not (tmp_path / "out").exists()


def test_a_product_that_bfloat16_rounds_to_infinity_is_refused(tmp_path: Path) -> None:
    tensors = deepseek({"model.layers.0.mlp.down_proj": (128, 128)})
    scale = np.float32(3.4e38) / np.float32(448)
    assert np.isfinite(np.float32(448) * scale)
    assert cast(np.array([[448]], E4M3), np.array([[scale]]), torch.bfloat16).isinf().all()
    tensors["model.layers.0.mlp.down_proj.weight_scale_inv"][0, 0] = scale
    source = write_model(tmp_path / "model", tensors, llama_config() | {"quantization_config": BLOCKS})
    with pytest.raises(InputError, match=r"model\.layers\.0\.mlp\.down_proj\.weight"):
        fp8pack.unpack(source, tmp_path / "out", dtype="bfloat16")


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_weights_with_a_nan_byte_are_all_named_and_nothing_is_committed(code: int, tmp_path: Path) -> None:
    names = ["model.layers.0.mlp.experts.0.gate_proj.weight", "model.layers.61.eh_proj.weight"]
    tensors = deepseek()
    for name in names:
        weight = tensors[name].view(np.uint8).copy()
        weight[-1, -1] = code
        tensors[name] = weight.view(E4M3)
    source = write_model(tmp_path / "model", tensors, llama_config() | {"quantization_config": BLOCKS})
    with pytest.raises(InputError) as caught:
        fp8pack.unpack(source, tmp_path / "out")
    assert all(name in str(caught.value) for name in names)
    assert str(caught.value).startswith("2 tensors contain a NaN")
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "out").exists()


# Layouts.


def test_a_single_file_gives_a_single_file(tmp_path: Path) -> None:
    write_shard(tmp_path / "x.safetensors", deepseek(), {"format": "pt", "note": "kept"})
    before = (tmp_path / "x.safetensors").read_bytes()
    facts = fp8pack.unpack(tmp_path / "x.safetensors")
    output = Path(facts.output)
    assert output == tmp_path / "x-BF16.safetensors"
    check(read_tensors(output), deepseek())
    assert {path.name for path in tmp_path.iterdir()} == {"x.safetensors", output.name, "x-BF16.fp8pack.json"}
    assert (tmp_path / "x.safetensors").read_bytes() == before
    assert fp8pack.unpack(tmp_path / "x.safetensors").already_complete


def test_a_single_file_with_a_limit_on_shards_loses_nothing(tmp_path: Path) -> None:
    write_shard(tmp_path / "x.safetensors", deepseek())
    options = WriteOptions(output=tmp_path / "y.safetensors", max_shard_size=50_000)
    try:
        verbs.unpack(tmp_path / "x.safetensors", options=options)
    except Fp8PackError as error:
        assert isinstance(error, RecipeError)
        assert not (tmp_path / "y.safetensors").exists()
    else:
        check(read_tensors(tmp_path / "y.safetensors"), deepseek())


def test_a_shard_that_held_nothing_but_scales_is_gone_and_the_index_knows(tmp_path: Path) -> None:
    tensors = deepseek()
    scales = {name: tensor for name, tensor in tensors.items() if name.endswith("scale_inv")}
    others = {name: tensor for name, tensor in tensors.items() if name not in scales}
    source = write_model(tmp_path / "model", tensors, llama_config() | {"quantization_config": BLOCKS})
    (source / "model.safetensors").unlink()
    weight_map = dict.fromkeys(others, "weights.safetensors") | dict.fromkeys(scales, "scales.safetensors")
    write_shard(source / "weights.safetensors", others)
    write_shard(source / "scales.safetensors", scales)
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    fp8pack.unpack(source, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == ["weights.safetensors"]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {"weights.safetensors"}
    check(read_tensors(tmp_path / "out"), tensors)


def test_a_hub_snapshot_is_unpacked_into_the_current_directory(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "hub" / "models--org--tiny-FP8"
    snapshot = cache / "snapshots" / "abc"
    (cache / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in checkpoint.iterdir():
        path.rename(cache / "blobs" / f"digest-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/digest-{path.name}")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    facts = fp8pack.unpack(snapshot)
    assert facts.output == tmp_path / "work" / "tiny-FP8-BF16"
    check(read_tensors(tmp_path / "work" / "tiny-FP8-BF16"), deepseek())
    assert not any(path.is_symlink() for path in (tmp_path / "work" / "tiny-FP8-BF16").iterdir())


def test_a_tensor_without_elements_is_carried_over(tmp_path: Path) -> None:
    tensors = deepseek() | {
        "empty": np.zeros((0, 4), np.float32),
        "model.layers.9.mlp.x._extra_state": np.zeros(0, "u1"),
    }
    source = write_model(tmp_path / "model", tensors, llama_config() | {"quantization_config": BLOCKS})
    fp8pack.unpack(source, tmp_path / "out")
    check(read_tensors(tmp_path / "out"), tensors)


def test_what_was_unpacked_can_be_looked_at(checkpoint: Path, tmp_path: Path) -> None:
    fp8pack.unpack(checkpoint, tmp_path / "out")
    facts = fp8pack.inspect(tmp_path / "out")
    assert facts.totals.num_packed == 0
    assert facts.totals.num_tensors == len(read_tensors(tmp_path / "out"))
    assert fp8pack.diff(checkpoint, tmp_path / "out").only_in_a == ()


# Outputs that exist, and what is asked for.


def test_a_finished_output_is_left_alone_and_another_dtype_needs_overwrite(checkpoint: Path, tmp_path: Path) -> None:
    options = WriteOptions(output=tmp_path / "out")
    first = verbs.unpack(checkpoint, options=options)
    again = verbs.unpack(checkpoint, options=options)
    assert again.already_complete
    assert again.root == first.root
    with pytest.raises(OutputError, match="exists"):
        verbs.unpack(checkpoint, dtype="float32", options=options)
    check(read_tensors(tmp_path / "out"), deepseek())
    fp8pack.unpack(checkpoint, tmp_path / "out", dtype="float32", overwrite=True)
    check(read_tensors(tmp_path / "out"), deepseek(), "float32")


@pytest.mark.parametrize(
    ("tensors", "dtype", "kind", "words"),
    [
        (
            {"model.layers.0.mlp.up_proj.weight": random_weight((64, 64))},
            "bfloat16",
            InputError,
            "no quantized weight to unpack",
        ),
        (deepseek(), "float8", RecipeError, "dtype 'float8' is not known"),
    ],
    ids=["no FP8", "no such dtype"],
)
def test_what_cannot_be_unpacked_is_refused_in_one_line(
    tensors: Tensors, dtype: str, kind: type[Exception], words: str, tmp_path: Path
) -> None:
    source = write_model(tmp_path / "model", tensors, llama_config())
    with pytest.raises(kind, match=words) as caught:
        fp8pack.unpack(source, tmp_path / "out", dtype=dtype)
    assert len(str(caught.value).splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_a_dry_run_tells_every_tensor_and_writes_nothing(checkpoint: Path, tmp_path: Path) -> None:
    facts = fp8pack.unpack(checkpoint, tmp_path / "out", dry_run=True)
    actions = {tensor.name: tensor.action for tensor in facts.tensors}
    assert [name for name, action in actions.items() if action == "unpacked"] == [
        name for name in actions if name.removesuffix(".weight") in SHAPES
    ]
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a disk of 1 MiB; skip where that is not allowed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting needs root")
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_too_little_space_ends_with_code_5_before_any_byte_and_with_more_it_continues(
    checkpoint: Path, small_disk: Path, tmp_path: Path
) -> None:
    with pytest.raises(SpaceError, match="free") as caught:
        fp8pack.unpack(checkpoint, small_disk / "out", dtype="float32")
    assert caught.value.exit_code == 5
    assert len(str(caught.value).splitlines()) == 1
    assert list(small_disk.rglob("*.safetensors")) == []
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    fp8pack.unpack(checkpoint, small_disk / "out", dtype="float32")
    check(read_tensors(small_disk / "out"), read_tensors(checkpoint), "float32")


# Interrupted. 24 weights of 256 KiB in bands of 16 KiB, each journalled at once: the run has a middle.

SLOW = """
import os, time
from fp8pack.packing import options
from fp8pack.planning.sizes import Sizes
options.SIZES = Sizes(band=16 << 10, checkpoint=1)
os.fdatasync = lambda fd: time.sleep(0.002)
from fp8pack.cli.app import main
main()
"""
PATIENCE = 60


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Return a function that starts `fp8pack unpack` on a checkpoint with a middle, in a process of its own."""
    shapes = {f"model.layers.{i}.mlp.down_proj": (512, 512) for i in range(24)}
    config = llama_config(layers=24) | {"quantization_config": BLOCKS}
    source = write_model(tmp_path / "model", deepseek(shapes), config, shards=2)

    def start(*flags: str) -> subprocess.Popen[str]:
        target = ["unpack", str(source), "-o", str(tmp_path / "out"), "--json", *flags]
        command = [sys.executable, "-c", SLOW, *target]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return start


def reach(process: subprocess.Popen[str], journal: Path, lines: int) -> None:
    """Return once the journal has this many lines."""
    while process.poll() is None:
        try:
            if journal.read_bytes().count(b"\n") >= lines:
                return
        except FileNotFoundError:
            pass
        time.sleep(0.001)
    raise AssertionError(f"it ended before: {process.communicate()}")


def check_finished(process: subprocess.Popen[str], tmp_path: Path) -> dict[str, Any]:
    stdout, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]
    check(read_tensors(tmp_path / "out"), read_tensors(tmp_path / "model"))
    return dict(json.loads(stdout))


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_the_same_command_continues_after_the_end_of_another(
    how: signal.Signals, run: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = run()
    reach(process, tmp_path / ".out.fp8pack-partial" / "journal.jsonl", 60)
    process.send_signal(how)
    _, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == (-9 if how == signal.SIGKILL else 143), stderr
    assert not (tmp_path / "out").exists()
    facts = check_finished(run(), tmp_path)
    assert facts["resumed_nbytes"] > 0
    undisturbed = fp8pack.unpack(tmp_path / "model", tmp_path / "reference")
    for path in (tmp_path / "reference").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
    assert undisturbed.output_nbytes == facts["output_nbytes"]


@pytest.mark.slow
def test_a_deadline_ends_with_code_7_and_the_same_command_continues(
    run: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = run("--deadline", "0.05s")
    _, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 7, stderr
    assert "the same command continues" in stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()
    journal = tmp_path / ".out.fp8pack-partial" / "journal.jsonl"
    kept = journal.exists() and b'"bands"' in journal.read_bytes()  # a slow machine may finish nothing by then
    assert (check_finished(run(), tmp_path)["resumed_nbytes"] > 0) == kept


@pytest.mark.slow
def test_unfinished_work_of_another_dtype_is_refused_and_kept(
    run: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = run()
    reach(process, tmp_path / ".out.fp8pack-partial" / "journal.jsonl", 20)
    process.kill()
    process.communicate()
    with pytest.raises(OutputError, match="another recipe"):
        fp8pack.unpack(tmp_path / "model", tmp_path / "out", dtype="float32")
    assert check_finished(run(), tmp_path)["resumed_nbytes"] > 0


# Memory.

MEASURED = """
import json, resource, sys
from pathlib import Path
import fp8pack
out, source, small = sys.argv[1:]
peaks = []
for name, path in (("small", small), ("large", source)):
    fp8pack.unpack(path, Path(out) / name, dtype="float32")
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
print(json.dumps(peaks))
"""


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(6144, 8192), (64, 786_432)], ids=["many rows", "long rows"])
def test_memory_does_not_grow_with_the_tensor(shape: tuple[int, int], tmp_path: Path) -> None:
    """48 MiB of FP8 that become 192 MiB of float32; what a small unpack needs, and a few bands."""
    config = llama_config() | {"quantization_config": BLOCKS}
    small = write_model(tmp_path / "small-model", deepseek(), config)
    grid = (-(-shape[0] // 128), -(-shape[1] // 128))
    tensors: Tensors = {
        "model.layers.0.mlp.down_proj.weight": np.full(shape, 0x38, np.uint8).view(E4M3),
        "model.layers.0.mlp.down_proj.weight_scale_inv": np.full(grid, 0.5, np.float32),
    }
    large = write_model(tmp_path / "model", tensors, config)
    ran = subprocess.run(
        [sys.executable, "-c", MEASURED, str(tmp_path), str(large), str(small)],
        capture_output=True, text=True, check=False, env=os.environ | {"MALLOC_ARENA_MAX": "2"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    before, after = json.loads(ran.stdout)
    assert after - before < 96 << 20
    assert (tmp_path / "large" / "model.safetensors").stat().st_size > 4 * shape[0] * shape[1]


def test_every_dtype_is_under_test() -> None:
    assert set(TORCH_NAMES) == set(DTYPES)


def test_a_buffer_in_float64_is_copied(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """Its dtype begins as those of six bits do."""
    table = np.arange(6, dtype=np.float64)
    source = make_checkpoint(llama_tensors() | {"model.table": table})
    fp8pack.pack(source, tmp_path / "packed")
    fp8pack.convert(tmp_path / "packed", tmp_path / "converted", quant_method="fp8pack")
    fp8pack.unpack(tmp_path / "converted", tmp_path / "unpacked")
    with safe_open(tmp_path / "unpacked" / "model.safetensors", "np") as opened:
        assert (opened.get_tensor("model.table") == table).all()
