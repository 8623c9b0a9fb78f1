"""`pack --eval`: the table is in the model card before the output has its name, and the manifest knows it."""

import json
from pathlib import Path

import pytest
from calibration.tiny_models import make_model, save_model
from checkpoints import llama_config, llama_tensors, write_model
from typer.testing import CliRunner

import fp8pack
from fp8pack.cli.app import app
from fp8pack.errors import InputError


@pytest.mark.parametrize("family", ["qwen3", "bert_base"])
def test_what_it_cost_is_in_the_card(family: str, tmp_path: Path) -> None:
    source = save_model(make_model(family), tmp_path / "model")
    out = tmp_path / "out"
    ran = CliRunner().invoke(app, ["pack", str(source), "-o", str(out), "--scheme", "FP8_DYNAMIC", "--eval"])
    assert ran.exit_code == 0, ran.exception
    card = (out / "README.md").read_text()
    assert "## What it cost the model" in card
    assert ("KL mean" if family == "qwen3" else "cosine, mean") in card
    assert "cost  " in ran.stderr
    assert fp8pack.verify(out).differences == ()
    plain = tmp_path / "plain"
    fp8pack.pack(source, plain, scheme="FP8_DYNAMIC")
    for name in (path.name for path in plain.iterdir() if path.name not in ("README.md", "fp8pack.json")):
        assert (plain / name).read_bytes() == (out / name).read_bytes(), name


def test_a_section_of_ones_own(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", llama_tensors(), llama_config())
    seen: list[list[str]] = []

    def section(folder: Path) -> str:
        seen.append(sorted(path.name for path in folder.iterdir()))
        assert not (tmp_path / "out").exists()
        return "## Mine\n\nA line."

    fp8pack.pack(source, tmp_path / "out", card_section=section)
    assert seen == [["config.json", "fp8pack.json", "model.safetensors"]]
    assert "\n## Mine\n\nA line.\n" in (tmp_path / "out" / "README.md").read_text()
    assert fp8pack.verify(tmp_path / "out").differences == ()


def test_a_source_without_a_tokenizer_is_refused_before_it_is_packed(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", llama_tensors(), llama_config())
    ran = CliRunner().invoke(app, ["pack", str(source), "-o", str(tmp_path / "out"), "--eval"])
    assert isinstance(ran.exception, InputError)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_what_is_packed_is_kept_when_the_evaluation_fails(tmp_path: Path) -> None:
    source = save_model(make_model("t5"), tmp_path / "model")
    ran = CliRunner().invoke(app, ["pack", str(source), "-o", str(tmp_path / "out"), "--eval", "-q"])
    assert isinstance(ran.exception, InputError)
    assert "the evaluation failed" in str(ran.exception)
    assert not (tmp_path / "out").exists()
    ran = CliRunner().invoke(app, ["pack", str(source), "-o", str(tmp_path / "out"), "--json", "-q"])
    assert json.loads(ran.stdout)["resumed_nbytes"] > 0


def test_a_card_says_what_it_lacks_and_which_statistics_it_used(tmp_path: Path) -> None:
    source = save_model(make_model("qwen3"), tmp_path / "model")
    fp8pack.calibrate(source, tmp_path / "c.safetensors", num_prompts=4, max_length=16)
    result = fp8pack.pack(source, tmp_path / "out", scheme="FP8", calibration=tmp_path / "c.safetensors")
    assert "README.md names no base model and no licence: add them before you publish" in result.notes
    digest = json.loads((tmp_path / "out" / "fp8pack.json").read_text())["recipe"]["calibration"]
    assert f"`FILE` is a calibration with the statistics `{digest}`" in (tmp_path / "out" / "README.md").read_text()
    (source / "README.md").write_text("---\nlicense: mit\nbase_model: a/b\n---\n")
    assert fp8pack.pack(source, tmp_path / "other", scheme="FP8_DYNAMIC").notes == ()
