"""inspect asks the engines with all that a checkpoint says of itself."""

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import llama_config, llama_tensors, write_model

import fp8pack


def with_list(folder: Path, entries: list[str]) -> Path:
    """A packed checkpoint by another tool, with these ignored modules."""
    source = write_model(folder / "source", llama_tensors(), llama_config())
    fp8pack.pack(source, folder / "out", scheme="FP8_DYNAMIC")
    (folder / "out" / "fp8pack.json").unlink()
    path = folder / "out" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["ignore"] = entries
    path.write_text(json.dumps(config))
    return folder / "out"


def verdict_of(folder: Path, engine: str) -> fp8pack.EngineVerdict:
    (found,) = fp8pack.inspect(folder, targets=(engine,)).engines
    return found


def test_a_list_that_is_right_is_taken(tmp_path: Path) -> None:
    assert verdict_of(with_list(tmp_path, ["lm_head"]), "vllm").tp


@pytest.mark.parametrize("entry", ["re:.*q_proj", "model.layers.0.self_attn.k_proj"])
def test_a_list_that_means_an_fp8_module_is_refused(entry: str, tmp_path: Path) -> None:
    verdict = verdict_of(with_list(tmp_path, ["lm_head", entry]), "vllm")
    assert not verdict.tp
    assert "self_attn" in verdict.reason


@pytest.mark.parametrize("entry", ["re:(a+)+$", "re:" + ".*" * 20 + "x", "*" * 50, "x" * 10_000, "re:(", 3])
def test_an_entry_that_would_cost_too_much_or_is_none_is_passed_over(entry: Any, tmp_path: Path) -> None:
    assert verdict_of(with_list(tmp_path, ["lm_head", entry]), "vllm").tp
