"""Floats that are not quantized, stored in another dtype."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from checkpoints import MakeCheckpoint, Tensors, llama_tensors
from safetensors.torch import load_file

import fp8pack
from fp8pack.errors import InputError, RecipeError

RNG = np.random.default_rng(0)
WIDE: Tensors = {
    "model.layers.0.mlp.gate.e_score_correction_bias": RNG.standard_normal(4, np.float32),
    "model.layers.0.mixer.A_log": RNG.standard_normal(8, np.float32),
    "model.table": np.arange(6, dtype=np.float64),
    "model.steps": np.arange(3),
}


def in_float32(tensors: Tensors) -> Tensors:
    """Random values of the same shapes, in float32."""
    return {name: RNG.standard_normal(tensor.shape, np.float32) for name, tensor in tensors.items()}


@pytest.fixture
def source(make_checkpoint: MakeCheckpoint) -> Path:
    """Return a checkpoint in float32, with tensors that stay so."""
    tensors = in_float32(llama_tensors()) | WIDE
    tensors["model.layers.0.self_attn.o_proj.bias"] = RNG.standard_normal(256, np.float32)
    return make_checkpoint(tensors, config={"dtype": "float32"})


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("float16", torch.float16)])
def test_kept_floats_are_rounded_once_and_the_rest_stays(
    source: Path, name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    result = fp8pack.pack(source, tmp_path / "out", scheme="FP8_DYNAMIC", kept_dtype=name)
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    actions = {tensor.name: tensor.action for tensor in result.kept}
    assert {tensor for tensor, action in actions.items() if action == "copied"} == WIDE.keys()
    for tensor, action in actions.items():
        expected = before[tensor].to(dtype) if action == "cast" else before[tensor]
        assert after[tensor].dtype == expected.dtype
        assert torch.equal(after[tensor], expected), tensor
    config = json.loads((tmp_path / "out" / "config.json").read_bytes())
    assert config["dtype"] == {torch.bfloat16: "bfloat16", torch.float16: "float16"}[dtype]
    plain = fp8pack.pack(source, tmp_path / "plain", scheme="FP8_DYNAMIC")
    assert result.output_nbytes < plain.output_nbytes


def test_payloads_and_scales_are_the_same_bytes(source: Path, tmp_path: Path) -> None:
    for place, dtype in (("cast", "bfloat16"), ("plain", None)):
        fp8pack.pack(source, tmp_path / place, scheme="FP8_BLOCK", kept_dtype=dtype)
    entries = [json.loads((tmp_path / place / "fp8pack.json").read_bytes())["tensors"] for place in ("cast", "plain")]
    packed = [name for name, entry in entries[0].items() if entry["action"] == "packed"]
    assert packed
    assert all(entries[0][name] == entries[1][name] for name in packed)


def test_a_cast_tensor_is_verified_shown_compared_and_unpacked(source: Path, tmp_path: Path) -> None:
    fp8pack.pack(source, tmp_path / "out", scheme="FP8_DYNAMIC", kept_dtype="bfloat16")
    assert fp8pack.load_packed(tmp_path / "out", verify=True)
    found = fp8pack.inspect(tmp_path / "out")["model.norm.weight"]
    assert (found.action, found.dtype) == ("cast", "BF16")
    compared = {tensor.name: tensor for tensor in fp8pack.diff(source, tmp_path / "out").tensors}
    assert compared["model.embed_tokens.weight"].sqnr > 40
    fp8pack.unpack(tmp_path / "out", tmp_path / "back")
    again = load_file(tmp_path / "back" / "model.safetensors")
    assert again["model.norm.weight"].dtype == torch.bfloat16
    assert fp8pack.pack(source, tmp_path / "out", scheme="FP8_DYNAMIC", kept_dtype="bfloat16").already_complete
    with pytest.raises(fp8pack.OutputError):
        fp8pack.pack(source, tmp_path / "out", scheme="FP8_DYNAMIC")


def test_the_manifest_is_a_recipe_for_the_same_again(source: Path, tmp_path: Path) -> None:
    first = fp8pack.pack(source, tmp_path / "out", scheme="FP8_DYNAMIC", kept_dtype="bfloat16")
    again = fp8pack.pack(source, tmp_path / "again", recipe=tmp_path / "out" / "fp8pack.json")
    assert again.root == first.root


def test_bands_of_a_cast_are_bands_of_the_source(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    embedding = RNG.standard_normal((1 << 13, 600), np.float32)  # more than two bands
    source = make_checkpoint(in_float32(llama_tensors()) | {"model.embed_tokens.weight": embedding})
    fp8pack.pack(source, tmp_path / "out", scheme="FP8_DYNAMIC", kept_dtype="bfloat16")
    assert fp8pack.load_packed(tmp_path / "out", verify=True)
    stored = load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(stored, torch.from_numpy(embedding).bfloat16())


def test_a_value_that_does_not_fit_is_named(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint(llama_tensors() | {"model.norm.weight": np.full(256, 1e5, np.float32)})
    with pytest.raises(InputError, match=r"out of range of the new dtype: model\.norm\.weight"):
        fp8pack.pack(source, tmp_path / "out", kept_dtype="float16")
    with pytest.raises(RecipeError, match="kept dtype 'float32' is not known"):
        fp8pack.pack(source, tmp_path / "out", kept_dtype="float32")


def test_what_a_class_keeps_in_float32_stays_so(tmp_path: Path) -> None:
    config = transformers.T5Config(vocab_size=128, d_model=128, d_kv=64, d_ff=256, num_layers=1, num_heads=2)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    result = fp8pack.pack(
        tmp_path / "model", tmp_path / "out", scheme="FP8_DYNAMIC", kept_dtype="bfloat16", ignore="*.wo"
    )
    actions = {tensor.name: tensor.action for tensor in result.kept}
    assert actions["encoder.block.0.layer.1.DenseReluDense.wo.weight"] == "copied"
    assert actions["shared.weight"] == "cast"


def test_an_embedding_model_in_float32_becomes_smaller_and_loads(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=512, hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256
    )
    torch.manual_seed(0)
    model = transformers.BertModel(config).eval()
    model.save_pretrained(tmp_path / "model")
    fp8pack.pack(tmp_path / "model", tmp_path / "out", scheme="FP8_DYNAMIC", kept_dtype="bfloat16")
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()
    assert loaded.dtype == torch.bfloat16
    tokens = torch.arange(5, 37)[None]
    with torch.no_grad():
        expected, found = (each(input_ids=tokens).last_hidden_state.float() for each in (model, loaded))
    assert torch.nn.functional.cosine_similarity(expected.flatten(), found.flatten(), dim=0) > 0.99
