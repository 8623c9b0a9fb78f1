"""Checkpoints that are malformed, unsafe, or of a kind that is refused; each says in one line what to do instead."""

import json
import os
import re
import socket
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import yaml
from safetensors import safe_open

from fp8pack.checkpoint.source import read_json
from fp8pack.errors import Fp8PackError, InputError, OutputError, SpaceError
from fp8pack.modelfacts.patterns import Pattern
from fp8pack.numerics.granularity import BLOCK_128, CHANNEL, MX, TENSOR, Granularity
from fp8pack.packing.pack import pack
from fp8pack.packing.prepare import WriteOptions, prepare_pack
from fp8pack.planning.recipe import Request

Refused = Callable[..., str]
Cli = Callable[..., subprocess.CompletedProcess[str]]
Change = Callable[[dict[str, Any]], None]

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
NAME = "model.layers.0.mlp.down_proj.weight"


def points_to(value: Any) -> Change:
    """Return a change of an index: one tensor is said to lie there."""

    def change(index: dict[str, Any]) -> None:
        index["weight_map"][NAME] = value

    return change


def total_size(value: Any) -> Change:
    """Return a change of an index: this total size."""

    def change(index: dict[str, Any]) -> None:
        index["metadata"] = {"total_size": value}

    return change


def files_of(folder: Path) -> dict[str, bytes]:
    """Return every file of a directory with its bytes."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def set_config(folder: Path, **changes: Any) -> Path:
    """Change config.json of a checkpoint in place; return its directory."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def pack_into(model: Path, output: Path, **options: Any) -> dict[str, Any]:
    """Pack with no request of our own."""
    return pack(model, Request(), WriteOptions(output=output, **options))


# The index: cases 63 to 82.

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


def test_74_a_tensor_that_is_not_in_the_index_is_refused(built: Any, refused: Refused, tmp_path: Path) -> None:
    model = built.mend_index(built.sharded(tmp_path / "model"), lambda index: index["weight_map"].pop(NAME))
    assert NAME in refused(model)


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
    assert {entry["file"] for entry in facts["left_out"]} == {
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


def test_several_shards_without_an_index_are_refused(built: Any, refused: Refused, tmp_path: Path) -> None:
    model = built.sharded(tmp_path / "model")
    (model / INDEX).unlink()
    assert "no index" in refused(model)


# config.json: cases 83 to 95.

CONFIGS = {
    "83-not-an-object": "[]",
    "83-text": '"config"',
    "83-null": "null",
    "83-not-json": "{",
    "83-empty": "",
    "83-two-documents": "{}{}",
    "83-duplicate-key": '{"model_type":"a","model_type":"b"}',
    "89-100000-deep": '{"a":' * 100_000,
    "90-5000-digits": f'{{"hidden_size":{"9" * 5000}}}',
}


@pytest.mark.parametrize("text", CONFIGS.values(), ids=CONFIGS.keys())
def test_a_malformed_config_is_refused(text: str, built: Any, refused: Refused, tmp_path: Path) -> None:
    model = built.single(tmp_path / "model")
    (model / "config.json").write_text(text)
    assert "config.json" in refused(model)


QUANTIZED: dict[str, dict[str, Any]] = {
    "84-fp8": {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
    "84-awq": {"quantization_config": {"quant_method": "awq", "bits": 4}},
    "84-gptq": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "84-unknown-method": {"quantization_config": {"quant_method": "sparkle"}},
    "84-no-method": {"quantization_config": {"bits": 4}},
    "84-method-not-text": {"quantization_config": {"quant_method": {"a": [1]}}},
    "84-not-an-object": {"quantization_config": "fp8"},
    "84-a-list": {"quantization_config": [1]},
    "85-text-config": {"text_config": {"quantization_config": {"quant_method": "fp8"}}},
    "85-compression-config": {"compression_config": {"quant_method": "compressed-tensors"}},
}


@pytest.mark.parametrize("changes", QUANTIZED.values(), ids=QUANTIZED.keys())
def test_a_quantized_checkpoint_is_refused(
    changes: dict[str, Any], built: Any, refused: Refused, tmp_path: Path
) -> None:
    refused(set_config(built.single(tmp_path / "model"), **changes))


def test_a_modelopt_checkpoint_is_refused(built: Any, refused: Refused, tmp_path: Path) -> None:
    model = built.single(tmp_path / "model")
    (model / "hf_quant_config.json").write_text('{"quantization":{"quant_algo":"FP8"}}')
    assert "modelopt" in refused(model)


UNQUANTIZED = {
    "null": '{\n  "model_type": "llama",\n  "quantization_config": null\n}\n',
    "null-first": '{"quantization_config": null, "model_type": "llama"}',
    "null-alone": '{"quantization_config": null}',
    "empty-object": '{"model_type": "llama", "quantization_config": {}}',
    "empty-config": "{}",
    "nested-null": '{"model_type": "llama", "x": {"quantization_config": null, "y": 1}}',
    "crlf": '{\r\n  "model_type": "llama"\r\n}\r\n',
    "nan": '{"model_type": "llama", "a": NaN, "b": -Infinity}',
}


@pytest.mark.parametrize("text", UNQUANTIZED.values(), ids=UNQUANTIZED.keys())
def test_config_comes_out_as_it_was_with_one_key_more(text: str, built: Any, tmp_path: Path) -> None:
    model = built.single(tmp_path / "model")
    (model / "config.json").write_bytes(text.encode())
    before = json.loads(text)
    before.pop("quantization_config", None)
    try:
        pack_into(model, tmp_path / "out")
    except InputError:
        assert text == UNQUANTIZED["empty-object"]
        return
    after = read_json(tmp_path / "out" / "config.json")
    assert isinstance(after.pop("quantization_config"), dict)
    assert repr(after) == repr(before)


ODD: dict[str, dict[str, Any]] = {
    "87-auto-map": {"auto_map": {"AutoModel": "modeling.Model"}},
    "88-a-billion-layers": {"num_hidden_layers": 10**9},
    "88-negative-layers": {"num_hidden_layers": -3},
    "88-layers-not-a-number": {"num_hidden_layers": "two"},
    "88-zero-heads": {"num_attention_heads": 0, "hidden_size": 128},
    "88-heads-a-list": {"num_attention_heads": [4]},
    "92-architectures-text": {"architectures": "LlamaForCausalLM"},
    "92-architectures-object": {"architectures": {"a": 1}},
    "92-architectures-of-numbers": {"architectures": [1, None]},
    "92-model-type-not-text": {"model_type": ["llama"]},
    "93-dtype-that-lies": {"torch_dtype": "float64", "dtype": 7},
    "94-tied-though-both-exist": {"tie_word_embeddings": True},
    "text-config-not-an-object": {"text_config": 5},
}


@pytest.mark.parametrize("changes", ODD.values(), ids=ODD.keys())
def test_an_odd_config_does_not_keep_a_checkpoint_from_being_packed(
    changes: dict[str, Any], built: Any, tmp_path: Path
) -> None:
    tensors = built.layer(0) | {"model.embed_tokens.weight": built.bits(5), "lm_head.weight": built.bits(6)}
    model = set_config(built.single(tmp_path / "model", tensors), **changes)
    (model / "modeling.py").write_text("raise SystemExit('this must never run')")
    pack_into(model, tmp_path / "out")
    packed = dict(safetensors.deserialize((tmp_path / "out" / "model.safetensors").read_bytes()))
    assert packed[NAME]["dtype"] == "F8_E4M3"
    assert packed.keys() >= tensors.keys()
    assert (tmp_path / "out" / "modeling.py").read_bytes() == (model / "modeling.py").read_bytes()


def test_87_an_architecture_cannot_send_control_sequences_to_the_terminal(built: Any, cli: Cli, tmp_path: Path) -> None:
    model = set_config(built.single(tmp_path / "model"), architectures=["\x1b[2JEvil\nsecond line"])
    (model / "note\x1b[31m.pt").write_text("")
    ran = cli("pack", model, "--dry-run")
    assert ran.returncode == 0
    assert "\x1b" not in ran.stderr + ran.stdout
    assert not any(line.startswith("second line") for line in ran.stderr.splitlines())


def _merges(levels: int) -> str:
    """Mappings that each merge the one before ten times over."""
    lines = ["a0: &a0 {k: v}"]
    lines += [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}" for n in range(1, levels)]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("---\nlicense: !!python/object/apply:os.system ['false']\n---\nbody", "license: !!python"),
        ("---\nlicense: &a [*a,*a]\nlanguage: {a: b}\ntags: 3\n---\nbody", "body"),
        ("---\nlicense: !!int ''\n---\nbody", "body"),
        ("---\nlicense: mit\n" + _merges(9) + "---\nbody", "body"),
        ("---\nlicense: mit\nnever closed", "never closed"),
        ("---\n- a\n- list\n---\nbody", "body"),
    ],
    ids=["python-object", "alias-bomb", "no-int", "merge-bomb", "no-closing-line", "a-list"],
)
def test_95_nothing_of_a_hostile_model_card_is_inherited_and_its_text_is_kept(
    text: str, kept: str, built: Any, tmp_path: Path
) -> None:
    model = built.single(tmp_path / "model")
    (model / "README.md").write_text(text)
    pack_into(model, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    head = card.split("---\n")[1]
    assert not {"license", "language"} & yaml.safe_load(head).keys()
    assert kept in card.split("---\n", 2)[2]


def test_an_architecture_that_is_no_name_does_not_reach_the_model_card(built: Any, tmp_path: Path) -> None:
    model = built.single(tmp_path / "model")
    (model / "config.json").write_text(json.dumps({"architectures": ["Llama'); import os\n```\n# Evil"]}))
    pack_into(model, tmp_path / "out")
    assert "Evil" not in (tmp_path / "out" / "README.md").read_text()


def test_a_model_card_too_long_to_merge_is_copied(built: Any, tmp_path: Path) -> None:
    model = built.single(tmp_path / "model")
    (model / "README.md").write_bytes(b"x" * (5 << 20))
    pack_into(model, tmp_path / "out")
    assert (tmp_path / "out" / "README.md").stat().st_size == 5 << 20


# Side files: what they may link to, and what they may be.


@pytest.mark.parametrize("target", ["/etc/passwd", "../secret", "../model-two/tokenizer.json", "sub/../../secret"])
def test_a_side_file_that_links_out_of_the_model_is_refused(
    target: str, built: Any, refused: Refused, tmp_path: Path
) -> None:
    model = built.single(tmp_path / "model")
    (tmp_path / "secret").write_text("secret")
    (model / "sub").mkdir()
    (model / "tokenizer.json").symlink_to(target)
    assert "tokenizer.json" in refused(model)


def test_a_directory_that_links_out_of_the_model_is_refused(built: Any, refused: Refused, tmp_path: Path) -> None:
    model = built.single(tmp_path / "model")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "secret").write_text("secret")
    (model / "assets").symlink_to("../elsewhere")
    refused(model)


def test_a_side_file_that_links_within_the_model_is_copied(built: Any, tmp_path: Path) -> None:
    model = built.single(tmp_path / "model")
    (model / "vocab.txt").write_text("words")
    (model / "tokenizer.txt").symlink_to("vocab.txt")
    pack_into(model, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.txt").read_text() == "words"
    assert not (tmp_path / "out" / "tokenizer.txt").is_symlink()


def test_a_hub_snapshot_whose_links_lead_into_blobs_is_packed(built: Any, tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--org--name"
    snapshot = repository / "snapshots" / "0123abcd"
    plain = built.single(tmp_path / "plain")
    (plain / "tokenizer.json").write_text("{}")
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(plain.iterdir())):
        path.rename(repository / "blobs" / f"{number:064}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:064}")
    pack_into(snapshot, tmp_path / "out")
    names = {"README.md", "config.json", "fp8pack.json", "model.safetensors", "tokenizer.json"}
    assert set(files_of(tmp_path / "out")) == names
    assert "base_model: org/name\nbase_model_relation: quantized\n" in (tmp_path / "out" / "README.md").read_text()
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


@pytest.mark.parametrize("target", [".", "..", "../model", "assets/loop"])
def test_a_loop_of_directories_is_refused_or_left_out(target: str, built: Any, tmp_path: Path) -> None:
    model = built.single(tmp_path / "model")
    (model / "assets").mkdir()
    (model / "assets" / "loop").symlink_to(target)
    try:
        facts = pack_into(model, tmp_path / "out")
    except InputError as error:
        assert "loop" in str(error)
        assert not (tmp_path / "out").exists()
    else:
        assert [entry["file"] for entry in facts["left_out"]] == ["assets/loop"]


def test_a_link_to_itself_is_refused_or_left_out(built: Any, tmp_path: Path) -> None:
    model = built.single(tmp_path / "model")
    (model / "tokenizer.json").symlink_to("tokenizer.json")
    try:
        facts = pack_into(model, tmp_path / "out")
    except InputError as error:
        assert "tokenizer.json" in str(error)
    else:
        assert [entry["file"] for entry in facts["left_out"]] == ["tokenizer.json"]


def test_a_broken_link_is_left_out_and_reported(built: Any, tmp_path: Path) -> None:
    model = built.single(tmp_path / "model")
    (model / "tokenizer.json").symlink_to("gone.json")
    facts = pack_into(model, tmp_path / "out")
    assert [entry["file"] for entry in facts["left_out"]] == ["tokenizer.json"]


@pytest.mark.parametrize("target", ["gone", "config.json", "/dev/null"])
def test_a_config_that_is_no_readable_file_is_refused_and_not_taken_as_absent(
    target: str, built: Any, refused: Refused, tmp_path: Path
) -> None:
    model = built.single(tmp_path / "model")
    (model / "config.json").unlink()
    (model / "config.json").symlink_to(target)
    assert "config.json" in refused(model)


@pytest.mark.parametrize("target", ["gone", "model.safetensors", "/dev/zero", "."])
def test_a_shard_that_is_no_readable_file_is_refused(target: str, built: Any, refused: Refused, tmp_path: Path) -> None:
    model = built.single(tmp_path / "model")
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to(target)
    assert "model.safetensors" in refused(model)


def test_a_fifo_or_socket_beside_the_weights_is_left_out_and_reported(built: Any, tmp_path: Path) -> None:
    model = built.single(tmp_path / "model")
    os.mkfifo(model / "tokenizer.json")
    with socket.socket(socket.AF_UNIX) as server:
        folder = os.open(model, os.O_RDONLY)
        server.bind(f"/proc/self/fd/{folder}/server.sock")  # the path itself may be too long for a socket
        os.close(folder)
    facts = pack_into(model, tmp_path / "out")
    assert {entry["file"] for entry in facts["left_out"]} == {"tokenizer.json", "server.sock"}


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", INDEX])
def test_a_fifo_in_the_place_of_a_file_that_is_needed_is_refused(
    name: str, built: Any, refused: Refused, tmp_path: Path
) -> None:
    model = built.sharded(tmp_path / "model") if name == INDEX else built.single(tmp_path / "model")
    (model / name).unlink()
    os.mkfifo(model / name)
    assert name in refused(model)


def test_a_hard_link_is_a_file_like_any_other(built: Any, tmp_path: Path) -> None:
    model = built.single(tmp_path / "model")
    (tmp_path / "vocab.txt").write_text("words")
    os.link(tmp_path / "vocab.txt", model / "vocab.txt")
    pack_into(model, tmp_path / "out")
    assert (tmp_path / "out" / "vocab.txt").read_text() == "words"
    assert (tmp_path / "out" / "vocab.txt").stat().st_nlink == 1


def test_overwriting_a_hard_link_to_the_source_leaves_the_source_alone(built: Any, tmp_path: Path) -> None:
    source, output = tmp_path / "x.safetensors", tmp_path / "y.safetensors"
    built.shard(source, built.layer(0))
    before = source.read_bytes()
    os.link(source, output)
    pack_into(source, output, overwrite=True)
    assert source.read_bytes() == before
    assert output.read_bytes() != before


# What fp8pack does not take, and the way out.


def test_a_git_lfs_pointer_is_refused_with_git_lfs_pull(built: Any, refused: Refused, tmp_path: Path) -> None:
    model = built.single(tmp_path / "model")
    (model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "git lfs pull" in refused(model)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.ckpt"])
def test_pickled_weights_are_refused_unopened(name: str, refused: Refused, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    assert "save_pretrained" in refused(model)


def test_a_lora_adapter_is_refused_with_merging_first(built: Any, refused: Refused, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    built.shard(model / "adapter_model.safetensors", {"base.lora_A.weight": built.bits(0)})
    (model / "adapter_config.json").write_text("{}")
    assert "merge" in refused(model)


def test_a_diffusers_pipeline_is_refused_with_its_transformer(built: Any, refused: Refused, tmp_path: Path) -> None:
    model = tmp_path / "model"
    built.single(model / "transformer")
    (model / "model_index.json").write_text("{}")
    assert f"{model}/transformer" in refused(model)


def test_gguf_files_are_refused(refused: Refused, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "model-Q4.gguf").write_bytes(b"GGUF" + bytes(100))
    assert "GGUF" in refused(model)


def test_a_directory_without_weights_is_refused(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    assert "no .safetensors file" in refused(tmp_path / "model")


def test_a_checkpoint_without_tensors_is_refused(built: Any, refused: Refused, tmp_path: Path) -> None:
    refused(built.single(tmp_path / "model", {}))


def test_tensors_that_are_fp8_already_are_refused(built: Any, refused: Refused, tmp_path: Path) -> None:
    model = built.single(tmp_path / "model")
    pack_into(model, tmp_path / "packed")
    (tmp_path / "packed" / "config.json").write_text("{}")
    assert "F8_E4M3 already" in refused(tmp_path / "packed")


def test_a_weight_with_a_scale_of_its_own_is_not_packed_over_it(built: Any, tmp_path: Path) -> None:
    extra = {NAME + "_scale": built.bits(8, 128, 1), NAME + "_scale_inv": built.bits(9, 1, 1)}
    model = built.single(tmp_path / "model", built.layer(0) | extra)
    try:
        pack_into(model, tmp_path / "out")
    except Fp8PackError as error:
        assert NAME in str(error)
        assert not (tmp_path / "out").exists()
    else:
        packed = dict(safetensors.deserialize((tmp_path / "out" / "model.safetensors").read_bytes()))
        for name, bits in extra.items():
            assert bytes(packed[name]["data"]) == bits.tobytes()


# Where the output may stand.


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("place", ["model", "model/out", "model/../model", "model/sub/../out", "link", "link/out"])
def test_an_output_in_the_source_is_refused(
    place: str, overwrite: bool, built: Any, refused: Refused, tmp_path: Path
) -> None:
    model = built.single(tmp_path / "model")
    (model / "sub").mkdir()
    (tmp_path / "link").symlink_to("model")
    refused(model, OutputError, output=tmp_path / place, overwrite=overwrite)


def test_an_output_over_a_directory_that_holds_the_source_is_refused(
    built: Any, refused: Refused, tmp_path: Path
) -> None:
    model = built.single(tmp_path / "models" / "mine")
    refused(model, OutputError, output=tmp_path / "models", overwrite=True)


def test_an_output_over_a_directory_that_holds_the_source_never_deletes_the_source(built: Any, tmp_path: Path) -> None:
    model = built.single(tmp_path / "models" / "mine")
    before = files_of(model)
    with pytest.raises(OutputError):
        pack_into(model, tmp_path / "models", overwrite=True)
    assert files_of(model) == before


def test_a_single_file_packed_onto_itself_is_refused(built: Any, refused: Refused, tmp_path: Path) -> None:
    built.shard(tmp_path / "x.safetensors", built.layer(0))
    refused(tmp_path / "x.safetensors", OutputError, output=tmp_path / "x.safetensors", overwrite=True)


def test_an_output_that_is_a_file_is_refused_and_kept(built: Any, tmp_path: Path) -> None:
    model = built.single(tmp_path / "model")
    (tmp_path / "out").write_text("a file")
    with pytest.raises(OutputError, match="exists"):
        pack_into(model, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "a file"
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_that_is_a_dangling_link_is_refused_before_any_work_or_replaced(
    overwrite: bool, built: Any, tmp_path: Path
) -> None:
    model = built.single(tmp_path / "model")
    (tmp_path / "out").symlink_to("nowhere")
    try:
        pack_into(model, tmp_path / "out", overwrite=overwrite)
    except OutputError:
        assert {path.name for path in tmp_path.iterdir()} == {"model", "out"}
        assert (tmp_path / "out").is_symlink()
    else:
        assert (tmp_path / "out" / "fp8pack.json").exists()


def test_overwriting_a_link_to_a_directory_leaves_what_it_points_to(built: Any, tmp_path: Path) -> None:
    model = built.single(tmp_path / "model")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("kept")
    (tmp_path / "out").symlink_to("precious")
    try:
        pack_into(model, tmp_path / "out", overwrite=True)
    except OutputError:
        assert (tmp_path / "out").is_symlink()
    else:
        assert (tmp_path / "out" / "fp8pack.json").exists()
        assert {path.name for path in tmp_path.iterdir()} == {"model", "out", "precious"}
    assert (tmp_path / "precious" / "file").read_text() == "kept"


def test_an_output_without_a_parent_directory_is_refused(built: Any, refused: Refused, tmp_path: Path) -> None:
    refused(built.single(tmp_path / "model"), SpaceError, output=tmp_path / "missing" / "out")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_in_a_directory_that_is_not_writable_is_refused(built: Any, refused: Refused, tmp_path: Path) -> None:
    model = built.single(tmp_path / "model")
    (tmp_path / "closed").mkdir(0o555)
    refused(model, SpaceError, output=tmp_path / "closed" / "out")


@pytest.mark.parametrize("name", ["with space", "ünïcödé-模型", "line\nbreak", "-dash", "x" * 200])
def test_an_output_with_an_odd_name_is_written(name: str, built: Any, tmp_path: Path) -> None:
    model = built.single(tmp_path / "model")
    pack_into(model, tmp_path / name)
    assert {path.name for path in tmp_path.iterdir()} == {"model", name}


@pytest.mark.parametrize("length", [250, 255, 256])
def test_an_output_whose_name_is_too_long_is_refused_or_written(length: int, built: Any, tmp_path: Path) -> None:
    model = built.single(tmp_path / "model")
    try:
        pack_into(model, tmp_path / ("x" * length))
    except (OutputError, SpaceError) as error:
        assert len(str(error).splitlines()) == 1
        assert {path.name for path in tmp_path.iterdir()} == {"model"}
    else:
        assert {path.name for path in tmp_path.iterdir()} == {"model", "x" * length}


# Weights that hold a NaN or infinity.

NAN, INFINITY = 0x7FC0, 0x7F80


def spoil(bits: Any, value: int) -> Any:
    """Return the bits with one of them replaced."""
    spoilt = bits.copy()
    spoilt[3, 5] = value
    return spoilt


def test_every_weight_with_a_nan_or_infinity_is_named_and_what_is_finished_is_used_again(
    built: Any, cli: Cli, tmp_path: Path
) -> None:
    model = built.sharded(tmp_path / "model")
    other = "model.layers.0.self_attn.o_proj.weight"
    tensors = built.layer(0)
    built.shard(model / FIRST, tensors | {NAME: spoil(tensors[NAME], NAN), other: spoil(tensors[other], INFINITY)})
    refusal = cli("pack", model, "-o", "out", "-q")
    assert refusal.returncode == 3
    assert len(refusal.stderr.splitlines()) == 1
    flags = re.findall(r"--ignore|(?<=--ignore )\S+", refusal.stderr)
    assert sorted(flags) == sorted(["--ignore", NAME, "--ignore", other])
    assert not (tmp_path / "out").exists()
    mended = cli("pack", model, "-o", "out", "--json", *flags)
    assert mended.returncode == 0
    assert json.loads(mended.stdout)["resumed_nbytes"] > 0
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out"}


@pytest.mark.parametrize(
    ("value", "granularity"),
    [(NAN, TENSOR), (INFINITY, TENSOR), (0xFFC1, CHANNEL), (0xFF80, CHANNEL), (NAN, BLOCK_128), (INFINITY, MX)],
    ids=["nan-tensor", "inf-tensor", "negative-nan-channel", "negative-inf-channel", "nan-block", "inf-mx"],
)
def test_a_nan_in_a_model_of_one_shard_is_mended_by_the_flag_that_the_message_names(
    value: int, granularity: Granularity, built: Any, tmp_path: Path
) -> None:
    tensors = built.layer(0)
    model = built.single(tmp_path / "model", tensors | {NAME: spoil(tensors[NAME], value)})
    options = WriteOptions(output=tmp_path / "out")
    request = Request(granularity=granularity)
    with pytest.raises(InputError, match=f"--ignore {NAME}"):
        pack(model, request, options)
    assert not (tmp_path / "out").exists()
    pack(model, replace(request, ignore=(Pattern(NAME),)), options)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out"}


def test_a_nan_in_a_tensor_that_is_copied_is_copied(built: Any, tmp_path: Path) -> None:
    name = "model.layers.0.input_layernorm.weight"
    norm = np.full(128, NAN, np.uint16)
    model = built.single(tmp_path / "model", built.layer(0) | {name: norm})
    pack_into(model, tmp_path / "out")
    packed = dict(safetensors.deserialize((tmp_path / "out" / "model.safetensors").read_bytes()))
    assert bytes(packed[name]["data"]) == norm.tobytes()


# The command line: exit code, one line, nothing left behind.


def test_a_refused_checkpoint_ends_with_code_3_and_one_line(built: Any, cli: Cli, tmp_path: Path) -> None:
    model = built.single(tmp_path / "model")
    os.truncate(model / "model.safetensors", 100)
    ran = cli("pack", model, "-o", "out")
    assert (ran.returncode, ran.stdout) == (3, "")
    assert len(ran.stderr.splitlines()) == 1
    assert ran.stderr.startswith("fp8pack: model.safetensors")
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


@pytest.mark.parametrize("name", ["org/unknown-name", "../modle", "a/b..c", "./a/-b", "a" * 60 + "/" + "b" * 60])
def test_a_repository_or_path_that_is_not_there_ends_with_code_3_and_one_line(
    name: str, cli: Cli, tmp_path: Path
) -> None:
    ran = cli("pack", name)
    assert (ran.returncode, ran.stdout) == (3, "")
    assert len(ran.stderr.splitlines()) == 1
    if name == "org/unknown-name":
        assert "hf download org/unknown-name" in ran.stderr


def test_an_output_that_exists_ends_with_code_4_and_one_line(built: Any, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    ran = cli("pack", built.single(tmp_path / "model"), "-o", "out", "-q")
    assert (ran.returncode, ran.stdout) == (4, "")
    assert len(ran.stderr.splitlines()) == 1


def test_an_output_in_a_missing_directory_ends_with_code_5_and_one_line(built: Any, cli: Cli, tmp_path: Path) -> None:
    ran = cli("pack", built.single(tmp_path / "model"), "-o", "missing/out", "-q")
    assert (ran.returncode, ran.stdout) == (5, "")
    assert len(ran.stderr.splitlines()) == 1


def test_a_hostile_checkpoint_is_refused_by_inspect_as_well(built: Any, cli: Cli, tmp_path: Path) -> None:
    model = built.mend_index(built.sharded(tmp_path / "model"), points_to("../../etc/x.safetensors"))
    ran = cli("inspect", model)
    assert (ran.returncode, ran.stdout) == (3, "")
    assert len(ran.stderr.splitlines()) == 1


def test_what_was_packed_from_an_odd_checkpoint_opens_in_the_safetensors_library(built: Any, tmp_path: Path) -> None:
    tensors = built.layer(0) | {"../../etc/passwd": built.bits(4), "x" * 4096: built.bits(5)}
    pack_into(built.single(tmp_path / "model", tensors), tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", framework="numpy") as opened:
        assert set(opened.keys()) >= set(tensors)
