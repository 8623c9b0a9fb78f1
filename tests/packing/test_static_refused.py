"""Scales of activations: what is refused, and the flags of the command line."""

import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import verbs
from checkpoints import MakeCheckpoint, llama_tensors, random_weight
from packing.static_sources import calibrate, files_of, pack_static, stored
from typer.testing import CliRunner

import fp8pack
from fp8pack.cli.app import app
from fp8pack.errors import InputError, RecipeError
from fp8pack.numerics.granularity import parse_granularity
from fp8pack.packing.options import WriteOptions
from fp8pack.planning.recipe import Request

# What is refused.


def test_the_calibration_of_another_model_is_refused(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint()
    other = make_checkpoint(llama_tensors() | {"model.norm.weight": random_weight((256,), 99)}, name="other")
    with pytest.raises(InputError, match="another model"):
        pack_static(source, tmp_path / "out", calibrate(other))
    assert not (tmp_path / "out").exists()
    assert pack_static(source, tmp_path / "out", calibrate(source, fingerprint="")).num_packed == 14


@pytest.mark.parametrize("content", [None, b"", b"not a calibration"])
def test_a_file_that_is_no_calibration_is_refused(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "calibration.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"calibration\.safetensors"):
        pack_static(make_checkpoint(), tmp_path / "out", path)


def test_weights_are_no_calibration(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint()
    with pytest.raises(InputError, match="is not a calibration file"):
        pack_static(source, tmp_path / "out", source / "model.safetensors")


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.input_scale", "model.layers.1.self_attn.v_proj.v_scale"])
def test_a_source_that_holds_such_a_tensor_is_refused(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, name: str
) -> None:
    source = make_checkpoint(llama_tensors() | {name: np.ones(1, np.float32)})
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        pack_static(source, tmp_path / "out", calibrate(source), kv_cache=True)


@pytest.mark.parametrize(
    "asked",
    [
        {"scheme": "FP8"},
        {"scheme": "FP8", "kv_cache": True},
        {"scheme": "FP8_DYNAMIC", "kv_cache": True},
        {"kv_cache": True},
        {"activations": "static"},
        {"scheme": "FP8_BLOCK", "activations": "static"},
        {"scheme": "FP8_BLOCK", "activations": "static", "kv_cache": True},
        {"granularity": "channel", "activations": "static"},
        {"scheme": "FP8", "quant_method": "compressed-tensors"},
    ],
    ids=lambda asked: " ".join(map(str, asked.values())),
)
def test_without_a_calibration_the_sentence_says_how_to_make_one(
    make_checkpoint: MakeCheckpoint, asked: dict[str, Any]
) -> None:
    source = make_checkpoint()
    granularity = {"granularity": parse_granularity(asked["granularity"])} if "granularity" in asked else {}
    with pytest.raises(RecipeError) as caught:
        fp8pack.pack(source, **asked | granularity)
    first, second = (shlex.split(command) for command in caught.value.command_line.split("`")[1::2])
    assert first == ["fp8pack", "calibrate", str(source)]
    assert second[0] == "--calibration"
    calibrate(source, Path(second[1]).stem).rename(second[1])
    recipe = fp8pack.pack(source, **asked | granularity, calibration=Path(second[1])).recipe
    expected = {key: value for key, value in asked.items() if key != "scheme"} | {
        "kv_cache": asked.get("kv_cache", False)
    }
    assert {key: recipe[key] for key in expected} == expected


# The command line.


def run(*arguments: str | Path) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["pack", *map(str, arguments)])
    return done.exit_code, done.stdout if done.exit_code == 0 else repr(done.exception)


def test_the_flags_mean_what_the_function_means(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint()
    calibration = calibrate(source)
    flags = ["--calibration", calibration, "--kv-cache", "--activations", "Static", "--margin", "-1", "--warmup", "1"]
    code, output = run(source, "-o", tmp_path / "flags", *flags)
    assert code == 0, output
    asked = Request(calibration=calibration, kv_cache=True, activations="static", margin=-1, warmup=1)
    verbs.pack(source, asked, WriteOptions(tmp_path / "function"))
    assert files_of(tmp_path / "flags") == files_of(tmp_path / "function")
    (tmp_path / "r.yaml").write_text("scheme: FP8\nactivations: static\nkv_cache: true\nmargin: -1\nwarmup: 1\n")
    code, output = run(source, "-o", tmp_path / "file", "--recipe", tmp_path / "r.yaml", "--calibration", calibration)
    assert code == 0, output
    assert stored(tmp_path / "file") == stored(tmp_path / "function")


@pytest.mark.parametrize(
    ("flags", "suffix"),
    [
        (["--scheme", "FP8"], "FP8"),
        ([], "FP8"),
        (["--scheme", "fp8", "--kv-cache"], "FP8-KV"),
        (["--scheme", "fp8_dynamic", "--kv-cache"], "FP8-dynamic-KV"),
        (["--kv-cache"], "FP8-block-KV"),
    ],
)
def test_outputs_are_named_after_what_they_hold(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, flags: list[str], suffix: str
) -> None:
    source = make_checkpoint()
    code, output = run(source, "--calibration", calibrate(source), *flags)
    assert code == 0, output
    assert (tmp_path / f"model-{suffix}" / "fp8pack.json").exists()
    assert output == f"{tmp_path / f'model-{suffix}'}\n"


@pytest.mark.parametrize(
    ("flags", "code"),
    [
        (["--scheme", "FP8", "--percentile", "nan"], 2),
        (["--scheme", "FP8", "--percentile", "0"], 2),
        (["--scheme", "FP8", "--percentile", "101"], 2),
        (["--scheme", "FP8", "--margin", "9"], 2),
        (["--scheme", "FP8", "--warmup", "-1"], 2),
        (["--scheme", "FP8", "--warmup", "3"], 3),
        (["--scheme", "FP8", "--percentile", "99", "--warmup", "1"], 2),
        (["--scheme", "FP8_DYNAMIC"], 2),
        (["--scheme", "FP8", "--quant-method", "mxfp8"], 2),
        (["--scheme", "FP8", "--target", "transformers"], 2),
        (["--scheme", "FP8", "--activations", "statical"], 2),
    ],
)
def test_what_is_refused_ends_with_a_code_and_writes_nothing(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, flags: list[str], code: int
) -> None:
    source = make_checkpoint()
    calibration = calibrate(source)
    before = sorted(tmp_path.iterdir())
    done = CliRunner().invoke(app, ["pack", str(source), "--calibration", str(calibration), *flags])
    found = getattr(done.exception, "exit_code", done.exit_code)
    assert found == code, repr(done.exception)
    assert sorted(tmp_path.iterdir()) == before
