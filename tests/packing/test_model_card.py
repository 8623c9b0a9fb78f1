"""README.md: what it says of the output, what it inherits, and how it goes when the FP8 bytes go."""

import json
from pathlib import Path
from typing import Any

import pytest
import verbs
import yaml
from checkpoints import DEMO, llama_config, llama_tensors, write_model

import fp8pack
from fp8pack.modelfacts.patterns import Pattern
from fp8pack.packing.options import WriteOptions
from fp8pack.planning.recipe import Request

BASE = "---\nlicense: no\nlanguage: [en, no]\ntags: [chat]\nlibrary_name: transformers\n---\n\n# A model\n\nIts text.\n"
UNREAD = {"scheme": "FP8_BLOCK", "quant_method": "modelopt"}  # by transformers


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = write_model(tmp_path / "source", llama_tensors(), llama_config())
    (folder / "README.md").write_text(BASE)
    return folder


def card_of(folder: Path) -> tuple[dict[str, Any], str]:
    _, head, body = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), body


def test_the_card_inherits_texts_as_they_stand_and_keeps_the_base_card(source: Path, tmp_path: Path) -> None:
    fp8pack.pack(source, tmp_path / "out", scheme="FP8_BLOCK")
    head, body = card_of(tmp_path / "out")
    assert head == {
        "license": "no",
        "language": ["en", "no"],
        "library_name": "transformers",
        "tags": ["chat", "fp8", "fp8pack"],
    }
    assert body.endswith("---\n\n# A model\n\nIts text.\n")


def test_a_library_that_does_not_load_the_output_is_not_named(source: Path, tmp_path: Path) -> None:
    fp8pack.pack(source, tmp_path / "out", **UNREAD)
    assert "library_name" not in card_of(tmp_path / "out")[0]


def test_a_conversion_replaces_our_card_and_unpacking_takes_it_away(source: Path, tmp_path: Path) -> None:
    fp8pack.pack(source, tmp_path / "a", **UNREAD)
    fp8pack.convert(tmp_path / "a", tmp_path / "b", quant_method="compressed-tensors")
    head, body = card_of(tmp_path / "b")
    assert head["tags"] == ["chat", "fp8", "compressed-tensors", "fp8pack"]
    assert body.count("in FP8") == 1
    assert "modelopt" not in body
    assert body.endswith("Its text.\n")
    fp8pack.unpack(tmp_path / "b", tmp_path / "c")
    head, body = card_of(tmp_path / "c")
    assert head == {"license": "no", "language": ["en", "no"], "tags": ["chat"]}
    assert body == "\n# A model\n\nIts text.\n"


def test_a_conversion_names_the_model_that_our_card_names(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0"
    write_model(snapshot, llama_tensors(), llama_config())
    fp8pack.pack(snapshot, tmp_path / "a", scheme="FP8_BLOCK")
    fp8pack.convert(tmp_path / "a", tmp_path / "b", quant_method="modelopt")
    head, body = card_of(tmp_path / "b")
    assert head["base_model"] == "org/name"
    assert "# name in FP8" in body
    fp8pack.unpack(tmp_path / "b", tmp_path / "c")
    assert not (tmp_path / "c" / "README.md").exists()


def test_the_card_of_a_fine_tune_does_not_name_what_it_was_tuned_from(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "tune", llama_tensors(), llama_config() | {"_name_or_path": "org/base"})
    fp8pack.pack(folder, tmp_path / "out")
    assert "org/base" not in (tmp_path / "out" / "README.md").read_text()


def test_patterns_of_the_command_do_not_break_the_table(tmp_path: Path) -> None:
    ignore = (Pattern("re:.*layers.0.mlp.(up|gate)_proj.weight"),)
    fp8pack.pack(DEMO, tmp_path / "out", ignore=ignore)
    rows = [line for line in card_of(tmp_path / "out")[1].splitlines() if "--ignore" in line and line.startswith("|")]
    assert rows
    assert all(r"(up\|gate)" in row for row in rows)


def test_dequantized_weights_are_not_among_those_ignored(source: Path, tmp_path: Path) -> None:
    fp8pack.pack(source, tmp_path / "a", scheme="FP8_BLOCK")
    ignore = (Pattern("*layers.0.mlp*"),)
    request = Request(quant_method="compressed-tensors", ignore=ignore)
    facts = verbs.convert(tmp_path / "a", request, WriteOptions(tmp_path / "b"))
    body = card_of(tmp_path / "b")[1]
    assert f"| dequantized | {facts.num_unpacked} weights, quantized in the source, are BF16 |" in body
    assert body.count("layers.0.mlp") == 1  # in the command


def test_the_dtype_in_config_json_is_that_of_the_floats(source: Path, tmp_path: Path) -> None:
    path = source / "config.json"
    towers = {"vision_config": {"dtype": "float32"}, "audio_config": {"torch_dtype": "bfloat16"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | towers))
    fp8pack.pack(source, tmp_path / "a", scheme="FP8_BLOCK")
    fp8pack.unpack(tmp_path / "a", tmp_path / "b", dtype="float16")
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["dtype"] == config["audio_config"]["torch_dtype"] == "float16"
    assert config["vision_config"]["dtype"] == "float32"
