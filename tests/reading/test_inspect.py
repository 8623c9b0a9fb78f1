"""inspect asks the engines with all that a checkpoint says of itself."""

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import llama_config, llama_tensors, write_model

import fp8pack
from fp8pack.numerics.metrics import LOST_DB


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


def test_a_nan_byte_in_the_payload_is_no_perfect_weight(tmp_path: Path) -> None:
    """Its noise is NaN: the weight is lost, JSON is valid, and a bound is broken."""
    source = write_model(tmp_path / "source", llama_tensors(), llama_config())
    fp8pack.pack(source, tmp_path / "out", scheme="FP8_DYNAMIC")
    (shard,) = (tmp_path / "out").glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    name = "model.layers.0.mlp.down_proj.weight"
    data[8 + int.from_bytes(data[:8], "little") + header[name]["data_offsets"][0]] = 0x7F
    shard.write_bytes(data)
    found = fp8pack.inspect(tmp_path / "out", source)
    assert (found[name].sqnr, found.totals.sqnr_min, found.totals.sqnr_worst_tensor) == (LOST_DB, LOST_DB, name)
    json.dumps(found.to_dict(), allow_nan=False)
    with pytest.raises(fp8pack.BoundError, match="sqnr_min is -1000"):
        fp8pack.inspect(tmp_path / "out", source, fail_if="sqnr_min<28")


def test_a_conversion_that_was_asked_for_says_so(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", llama_tensors(), llama_config())
    fp8pack.pack(source, tmp_path / "block", scheme="FP8_BLOCK")
    named = fp8pack.convert(tmp_path / "block", tmp_path / "named", scheme="FP8_DYNAMIC", dry_run=True)
    kept = fp8pack.convert(tmp_path / "block", tmp_path / "kept", ignore="*.o_proj", dry_run=True)
    reasons = [result.scheme.reason for result in (named, kept) if result.scheme]
    assert reasons == ["asked for", "as in the source"]
