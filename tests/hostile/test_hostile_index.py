"""Indexes that are malformed, or name what is not there; cases 63 to 82."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors
from hostile.hostile_models import FIRST, INDEX, NAME, SECOND, Change, Refused, pack_into, points_to

import fp8pack
from fp8pack.packing.options import WriteOptions
from fp8pack.packing.prepare import prepare_pack
from fp8pack.planning.recipe import Request


def total_size(value: Any) -> Change:
    """Return a change of an index: this total size."""

    def change(index: dict[str, Any]) -> None:
        index["metadata"] = {"total_size": value}

    return change


FOREIGN = {
    "65-not-text-number": 5,
    "66-not-text-null": None,
    "66-not-text-list": [FIRST],
    "67-parent-directory": "../model.safetensors",
    "68-absolute-path": "/etc/passwd",
    "68-absolute-path-of-a-shard": "/tmp/x.safetensors",
    "69-backslash": "..\\x.safetensors",
    "69-drive": "C:x.safetensors",
    "69-network-share": "\\\\host\\share\\x.safetensors",
    "70-subdirectory": "sub/x.safetensors",
    "71-pickle": "pytorch_model.bin",
    "72-empty": "",
    "72-dot": ".",
    "72-two-dots": "..",
    "72-nul": "x\0.safetensors",
    "72-newline": "x\n.safetensors",
    "72-surrogate": "\ud800.safetensors",
    "72-over-255-bytes": "x" * 300 + ".safetensors",
    "76-missing-file": "model-00003-of-00002.safetensors",
}


@pytest.mark.parametrize("value", FOREIGN.values(), ids=FOREIGN.keys())
def test_an_index_that_names_no_file_beside_it_is_refused(
    value: Any, built: Any, refused: Refused, tmp_path: Path
) -> None:
    refused(built.mend_index(built.sharded(tmp_path / "model"), points_to(value)))


TEXTS = {
    "63-not-an-object": "[]",
    "63-not-json": "<html>",
    "63-empty": "",
    "64-no-weight-map": "{}",
    "65-weight-map-a-list": '{"weight_map":[]}',
    "65-weight-map-null": '{"weight_map":null}',
    "65-weight-map-empty": '{"weight_map":{}}',
    "79-duplicate-keys": f'{{"weight_map":{{"a":"{FIRST}","a":"{SECOND}"}}}}',
    "79-weight-map-twice": f'{{"weight_map":{{"a":"{FIRST}"}},"weight_map":{{"a":"{FIRST}"}}}}',
    "nested-too-deep": "[" * 100_000,
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_a_malformed_index_is_refused(text: str, built: Any, refused: Refused, tmp_path: Path) -> None:
    model = built.sharded(tmp_path / "model")
    (model / INDEX).write_text(text)
    refused(model)


def test_73_a_tensor_that_is_only_in_the_index_is_refused(built: Any, refused: Refused, tmp_path: Path) -> None:
    model = built.mend_index(built.sharded(tmp_path / "model"), lambda index: index["weight_map"].update(ghost=FIRST))
    assert "'ghost'" in refused(model)


def test_74_a_tensor_that_is_not_in_the_index_is_skipped_with_a_line(built: Any, tmp_path: Path) -> None:
    """As transformers and vLLM do, which read what the index names."""
    model = built.mend_index(built.sharded(tmp_path / "model"), lambda index: index["weight_map"].pop(NAME))
    result = fp8pack.pack(model, tmp_path / "out", dry_run=True)
    assert sum(NAME in warning for warning in result.warnings) == 1
    assert NAME not in {tensor.name for tensor in result.tensors}


def test_74_a_tensor_that_the_index_puts_into_the_other_shard_is_refused(
    built: Any, refused: Refused, tmp_path: Path
) -> None:
    assert NAME in refused(built.mend_index(built.sharded(tmp_path / "model"), points_to(SECOND)))


def test_75_a_tensor_in_two_shards_is_refused(built: Any, refused: Refused, tmp_path: Path) -> None:
    model = built.sharded(tmp_path / "model")
    built.shard(model / SECOND, built.layer(1) | {NAME: built.bits(7)})
    message = refused(model)
    assert FIRST in message
    assert SECOND in message


def test_76_a_missing_shard_is_refused_by_its_name(built: Any, refused: Refused, tmp_path: Path) -> None:
    model = built.sharded(tmp_path / "model")
    (model / SECOND).unlink()
    assert SECOND in refused(model)


def test_77_a_shard_that_no_index_names_is_left_out_and_reported(built: Any, tmp_path: Path) -> None:
    model = built.sharded(tmp_path / "model")
    built.shard(model / "consolidated.safetensors", built.layer(0))
    built.shard(model / "model-00003-of-00003.safetensors", built.layer(5))
    facts = pack_into(model, tmp_path / "out")
    assert {entry.file for entry in facts.skipped} == {
        "consolidated.safetensors",
        "model-00003-of-00003.safetensors",
    }
    assert not (tmp_path / "out" / "consolidated.safetensors").exists()


@pytest.mark.parametrize("value", [0, -1, 1.5, "1", None, float("inf"), 10**400], ids=lambda value: str(value)[:10])
def test_78_a_wrong_total_size_is_not_believed(value: Any, built: Any, tmp_path: Path) -> None:
    model = built.mend_index(built.sharded(tmp_path / "model"), total_size(value))
    pack_into(model, tmp_path / "out")
    written = json.loads((tmp_path / "out" / INDEX).read_text())["metadata"]["total_size"]
    found = 0
    for path in (tmp_path / "out").glob("*.safetensors"):
        found += sum(len(view["data"]) for _, view in safetensors.deserialize(path.read_bytes()))
    assert written == found


def test_80_shards_that_differ_only_in_case_are_refused(built: Any, refused: Refused, tmp_path: Path) -> None:
    model = built.mend_index(
        built.sharded(tmp_path / "model"), points_to(FIRST.upper().replace(".SAFETENSORS", ".safetensors"))
    )
    assert "case" in refused(model)


def test_81_an_index_over_100_MB_is_refused_unread(built: Any, refused: Refused, tmp_path: Path) -> None:
    model = built.sharded(tmp_path / "model")
    os.truncate(model / INDEX, 100_000_001)
    assert INDEX in refused(model)


def test_82_a_whole_model_wins_over_an_index_beside_it(built: Any, tmp_path: Path) -> None:
    model = built.sharded(tmp_path / "model")
    built.shard(model / "model.safetensors", built.layer(0))
    prepared = prepare_pack(model, Request(), WriteOptions(output=tmp_path / "out"))
    assert [file.name for file in prepared.source.files] == ["model.safetensors"]
    assert {side.name for side in prepared.side_files if side.rule} == {FIRST, SECOND, INDEX}


def test_several_files_without_an_index_or_numbers_are_refused(built: Any, refused: Refused, tmp_path: Path) -> None:
    model = built.sharded(tmp_path / "model")
    (model / INDEX).unlink()
    (model / SECOND).rename(model / "second.safetensors")
    assert "no index" in refused(model)


def test_a_numbered_set_that_would_be_huge_is_refused_at_its_first_gap(
    built: Any, refused: Refused, tmp_path: Path
) -> None:
    model = built.sharded(tmp_path / "model")
    (model / INDEX).unlink()
    for path in model.glob("*.safetensors"):
        path.rename(model / f"model-{path.name.split('-')[1]}-of-{'9' * 30}.safetensors")
    assert "is missing" in refused(model)
