"""`pack --keep`: weights stay that cost most, the manifest reproduces it, and another model's costs are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from calibration.tiny_models import make_model, save_model
from checkpoints import MakeCheckpoint, Tensors, llama_tensors
from packing.static_sources import stored
from typer.testing import CliRunner

import fp8pack
from fp8pack.checkpoint.source import open_checkpoint
from fp8pack.cli.app import app
from fp8pack.errors import InputError, RecipeError

WORST = "model.layers.1.mlp.down_proj.weight"


def sensitivity(source: Path, tensors: Tensors, **changes: Any) -> Path:
    """Write what `eval --per-linear -o` would: the later a weight, the more it costs."""
    names = [name for name in tensors if name.endswith("_proj.weight")]
    modules = [name.removesuffix(".weight") for name in names]
    document = {
        "fingerprint": open_checkpoint(source).fingerprint,
        "parts": [
            {"name": module, "kl": {"value": 0.001 * i + (1 if name == WORST else 0)}, "tensors": [name]}
            for i, (name, module) in enumerate(zip(names, modules, strict=True))
        ],
        "linears": [{"name": module, "sqnr": 40.0 - i} for i, module in enumerate(modules)],
    }
    path = source.parent / "sensitivity.json"
    path.write_text(json.dumps(document | changes))
    return path


def test_the_worst_stays_and_the_manifest_packs_the_same_again(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    tensors = llama_tensors()
    source = make_checkpoint(tensors)
    costs = sensitivity(source, tensors)
    found = fp8pack.pack(source, tmp_path / "out", scheme="FP8_DYNAMIC", keep="worst:1", sensitivity=costs)
    assert found.choice is not None
    assert found.choice.kept == (WORST,)
    out = stored(tmp_path / "out")
    assert out[WORST] == ("BF16", tensors[WORST].shape, tensors[WORST].tobytes())
    assert sum(dtype == "F8_E4M3" for dtype, _, _ in out.values()) == 13
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert WORST.removesuffix(".weight") in config["ignore"]
    again = fp8pack.pack(source, tmp_path / "again", recipe=tmp_path / "out" / "fp8pack.json")
    assert again.root == found.root


def test_a_fused_group_stays_as_one(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    tensors = llama_tensors()
    source = make_checkpoint(tensors)
    found = fp8pack.pack(
        source, tmp_path / "out", dry_run=True, keep="sqnr_output>=38.5", sensitivity=sensitivity(source, tensors)
    )
    kept = [tensor.name for tensor in found.kept if "rule: keep" in tensor.reason]
    for group in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        for layer in range(2):
            members = [name for name in kept if f"layers.{layer}." in name and name.split(".")[-2] in group]
            assert len(members) in (0, len(group))
    assert kept


def test_what_does_not_fit_is_refused(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    tensors = llama_tensors()
    source = make_checkpoint(tensors)
    costs = sensitivity(source, tensors)
    out = tmp_path / "out"
    with pytest.raises(RecipeError, match="belong together"):
        fp8pack.pack(source, out, keep="worst:1")
    with pytest.raises(RecipeError, match="belong together"):
        fp8pack.pack(source, out, sensitivity=costs)
    with pytest.raises(RecipeError, match="keeps every weight"):
        fp8pack.pack(source, out, keep="worst:99", sensitivity=costs)
    with pytest.raises(InputError, match="is not of"):
        fp8pack.pack(source, out, keep="worst:1", sensitivity=sensitivity(source, tensors, fingerprint="blake3:other"))
    with pytest.raises(InputError, match="malformed: 'parts'"):
        fp8pack.pack(source, out, keep="worst:1", sensitivity=sensitivity(source, tensors, parts=3))
    (tmp_path / "text.json").write_text("no JSON")
    with pytest.raises(InputError, match="is no evaluation"):
        fp8pack.pack(source, out, keep="worst:1", sensitivity=tmp_path / "text.json")
    with pytest.raises(InputError):
        fp8pack.pack(source, out, keep="worst:1", sensitivity=tmp_path / "missing.json")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_the_command_measures_chooses_and_corrects(family: str, tmp_path: Path) -> None:
    source = save_model(make_model(family), tmp_path / "model")
    command = ["pack", str(source), "-o", str(tmp_path / "out"), "--scheme", "FP8_DYNAMIC", "--keep", "worst:2"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "predicted" in done.stderr
    assert "2 of" in done.stderr
    recipe = json.loads((tmp_path / "out" / "fp8pack.json").read_bytes())["recipe"]
    assert {rule["action"] for rule in recipe["rules"]} == {"keep"}
    assert [path.name for path in tmp_path.iterdir() if "fp8pack-keep" in path.name] == []


@pytest.mark.slow
def test_what_eval_writes_is_what_keep_reads(tmp_path: Path) -> None:
    source = save_model(make_model("qwen3"), tmp_path / "model")
    fp8pack.pack(source, tmp_path / "packed", scheme="FP8_DYNAMIC")
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": f"text {i}, not long"}) + "\n" for i in range(9)))
    options = ["--text", str(tmp_path / "texts.jsonl"), "-o", str(tmp_path / "costs.json"), "-q"]
    command = ["eval", str(tmp_path / "packed"), "--against", str(source), "--per-linear", *options]
    assert CliRunner().invoke(app, command).exit_code == 0
    measured = fp8pack.evaluate_layers(
        tmp_path / "packed", source, by="linear", text=str(tmp_path / "texts.jsonl"), device="cpu"
    )
    found = [
        fp8pack.pack(source, tmp_path / "out", scheme="FP8_DYNAMIC", keep="worst:3", sensitivity=costs, dry_run=True)
        for costs in (tmp_path / "costs.json", measured)
    ]
    assert found[0].choice is not None
    assert found[0].choice.kept == found[1].choice.kept  # type: ignore[union-attr]
    wrong = [*command[:-5], "-o", str(tmp_path / "costs.txt")]
    assert CliRunner().invoke(app, wrong).exit_code != 0
