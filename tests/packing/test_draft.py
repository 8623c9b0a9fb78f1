"""EAGLE-3 drafts: a layer without a number, tables of ids, and a linear that joins the hidden states of the target."""

from pathlib import Path

import numpy as np
import pytest
from checkpoints import LLAMA_LAYER, Tensors, llama_config, random_weight, read_tensors, write_model

import fp8pack
from fp8pack.checkpoint.source import read_json

VOCABULARY = 384


def draft_tensors() -> Tensors:
    """A draft of one layer, whose attention reads embeddings beside hidden states."""
    shapes: dict[str, tuple[int, ...]] = {"fc": (256, 3 * 256), "norm": (256,), "lm_head": (VOCABULARY, 256)}
    shapes |= {f"midlayer.{name}": shape for name, shape in LLAMA_LAYER.items()}
    shapes |= {f"midlayer.self_attn.{leaf}_proj": (n, 512) for leaf, n in (("q", 256), ("k", 128), ("v", 128))}
    shapes |= {"midlayer.hidden_norm": (256,)}
    tensors = {f"{name}.weight": random_weight(shape, seed) for seed, (name, shape) in enumerate(shapes.items())}
    return tensors | {"d2t": np.arange(VOCABULARY), "t2d": np.arange(2 * VOCABULARY) % 2 == 0}


@pytest.mark.parametrize("architecture", ["LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM"])
def test_the_layer_is_packed_and_what_joins_and_maps_stays(tmp_path: Path, architecture: str) -> None:
    source = draft_tensors()
    model = write_model(tmp_path / "draft", source, llama_config(architecture, layers=1))
    result = fp8pack.pack(model, tmp_path / "out", scheme="FP8_BLOCK")
    found = read_tensors(tmp_path / "out")
    packed = {name for name in source if f"{name}_scale_inv" in found}
    assert packed == {name for name in source if name.startswith("midlayer.") and source[name].ndim == 2}
    for name in source.keys() - packed:
        np.testing.assert_array_equal(found[name].view(np.uint8), source[name].view(np.uint8))
    reasons = {tensor.name: tensor.reason for tensor in result.kept}
    assert reasons["fc.weight"] == "policy: linear outside the numbered blocks"
    assert result.warnings == ()
    ignored = read_json(tmp_path / "out" / "config.json")["quantization_config"]["modules_to_not_convert"]
    assert {"fc", "model.fc", "lm_head"} <= set(ignored)
    assert "vllm" in {verdict.engine for verdict in result.engines if verdict.tp}
    assert fp8pack.load_packed(tmp_path / "out", verify=True).fused("midlayer.self_attn.qkv_proj").shape == (512, 512)


def test_a_draft_without_a_head_of_its_own_names_the_joining_linear_too(tmp_path: Path) -> None:
    tensors = draft_tensors()
    del tensors["lm_head.weight"]
    model = write_model(tmp_path / "draft", tensors, llama_config("LlamaForCausalLMEagle3", layers=1))
    fp8pack.pack(model, tmp_path / "out", scheme="FP8_DYNAMIC")
    assert "model.fc" in read_json(tmp_path / "out" / "config.json")["quantization_config"]["ignore"]
