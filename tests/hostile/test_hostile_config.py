"""config.json and model cards that are malformed, unsafe or odd; cases 83 to 95."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import yaml
from checkpoints import read_tensors, write_shard
from hostile.hostile_models import NAME, Cli, Refused, pack_into

import fp8pack
from fp8pack.checkpoint.source import read_json
from fp8pack.errors import InputError


def set_config(folder: Path, **changes: Any) -> Path:
    """Change config.json of a checkpoint in place; return its directory."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


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


PAYLOAD = {"model.layers.0.mlp.up_proj.qweight": np.ones((32, 64), np.int32)}


@pytest.mark.parametrize("changes", QUANTIZED.values(), ids=QUANTIZED.keys())
def test_a_quantized_checkpoint_is_refused(
    changes: dict[str, Any], built: Any, refused: Refused, tmp_path: Path
) -> None:
    model = set_config(built.single(tmp_path / "model"), **changes)
    write_shard(model / "model.safetensors", read_tensors(model / "model.safetensors") | PAYLOAD)
    assert "quantized already" in refused(model)


@pytest.mark.parametrize("changes", QUANTIZED.values(), ids=QUANTIZED.keys())
def test_a_declaration_that_no_tensor_bears_out_is_dropped(changes: dict[str, Any], built: Any, tmp_path: Path) -> None:
    model = set_config(built.single(tmp_path / "model"), **changes)
    result = fp8pack.pack(model, tmp_path / "out", scheme="FP8_BLOCK")
    assert sum("the declaration is dropped" in warning for warning in result.warnings) == 1
    assert all(warning.isprintable() for warning in result.warnings)
    text = (tmp_path / "out" / "config.json").read_text()
    assert text.count("quantization_config") == 1
    assert json.loads(text)["quantization_config"]["quant_method"] == "fp8"


def test_a_modelopt_checkpoint_is_refused(built: Any, refused: Refused, tmp_path: Path) -> None:
    model = built.single(tmp_path / "model")
    (model / "hf_quant_config.json").write_text('{"quantization":{"quant_algo":"FP8"}}')
    write_shard(model / "model.safetensors", read_tensors(model / "model.safetensors") | PAYLOAD)
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
