"""Prefixes that training wrappers left, and parts of sharded saves: never packed as they are without a word."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoints import MakeCheckpoint, Tensors, llama_config, llama_tensors, read_tensors

import fp8pack
from fp8pack.errors import InputError, RecipeError
from fp8pack.modelfacts.prefixes import strip_prefixes, wrapper_of
from fp8pack.modelfacts.spec import TensorSpec


def spec(name: str) -> TensorSpec:
    return TensorSpec(name, "BF16", (2, 2), "model.safetensors", 0, 8)


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("model.layers.0.mlp.up_proj.weight", ""),
        ("_orig_mod.model.layers.0.mlp.up_proj.weight", "_orig_mod."),
        ("model.layers.0._orig_mod.mlp.up_proj.weight", "_orig_mod."),
        ("_fsdp_wrapped_module.model.layers.0._fsdp_wrapped_module.mlp.up_proj.weight", "_fsdp_wrapped_module."),
        ("module.model.layers.0.mlp.up_proj.weight", "module."),
        ("model.module.layers.0.mlp.up_proj.weight", ""),
        ("model.my_orig_mod.weight", ""),
    ],
)
def test_the_prefix_of_a_wrapper_is_found(name: str, prefix: str) -> None:
    assert wrapper_of(name) == prefix
    if prefix:
        [stripped] = strip_prefixes([spec(name)], [prefix])
        assert stripped.name == "model.layers.0.mlp.up_proj.weight"


def test_several_prefixes_go_in_order() -> None:
    [found] = strip_prefixes([spec("module._orig_mod.model.norm.weight")], ["module.", "_orig_mod."])
    assert found.name == "model.norm.weight"


def test_a_prefix_that_nothing_has_and_a_collision_are_sentences() -> None:
    with pytest.raises(RecipeError, match=r"no tensor name begins with 'model\.x'"):
        strip_prefixes([spec("model.norm.weight")], ["model.x"])
    with pytest.raises(InputError, match=r"would both be named 'a\.weight'"):
        strip_prefixes([spec("module.a.weight"), spec("a.weight")], ["module."])
    with pytest.raises(InputError, match="would both be named ''"):
        strip_prefixes([spec("module.")], ["module."])


def wrapped(prefix: str) -> Tensors:
    return {f"{prefix}{name}": tensor for name, tensor in llama_tensors().items()}


@pytest.mark.parametrize("prefix", ["_orig_mod.", "_fsdp_wrapped_module.", "module."])
def test_wrapped_names_are_loaded_by_no_engine_until_the_prefix_goes(
    prefix: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    plain = fp8pack.pack(make_checkpoint(), tmp_path / "plain")
    source = make_checkpoint(wrapped(prefix), name="wrapped", shards=2)
    as_it_is = fp8pack.pack(source, dry_run=True)
    refused = {verdict.engine for verdict in as_it_is.engines if verdict.remedy == f"--strip-prefix {prefix}"}
    assert refused == {"vllm", "sglang", "tensorrt-llm", "transformers", "tgi", "lmdeploy"}
    result = fp8pack.pack(source, tmp_path / "out", strip_prefix=prefix)
    assert read_tensors_of(tmp_path / "out").keys() == read_tensors_of(plain.output).keys()
    for name, tensor in read_tensors_of(plain.output).items():
        assert np.array_equal(tensor.view(np.uint8), read_tensors_of(tmp_path / "out")[name].view(np.uint8))
    assert result.recipe["strip_prefix"] == [prefix]
    found = fp8pack.inspect(tmp_path / "out", against=source)
    assert found.totals.sqnr_min is not None
    assert fp8pack.pack(source, tmp_path / "out", strip_prefix=prefix).already_complete


def read_tensors_of(folder: Path) -> Tensors:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in read_tensors(path).items()}


def test_a_prefix_of_an_fp8_checkpoint_goes_on_conversion(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    fp8pack.pack(make_checkpoint(wrapped("module.")), tmp_path / "a", scheme="FP8_BLOCK")
    fp8pack.convert(tmp_path / "a", tmp_path / "b", scheme="FP8_DYNAMIC", strip_prefix="module.")
    assert "model.layers.0.mlp.up_proj.weight" in read_tensors_of(tmp_path / "b")
    assert not any(name.startswith("module.") for name in read_tensors_of(tmp_path / "b"))


# Parts of a checkpoint.


def cut(name: str, shape: tuple[int, ...]) -> Tensors:
    return llama_tensors() | {name: np.zeros(shape, ml_dtypes.bfloat16)}


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("model.embed_tokens.weight", (0,), r"model.embed_tokens.weight has shape \[0\]"),
        ("model.layers.1.mlp.up_proj.weight", (0, 256), r"up_proj.weight has shape \[0, 256\]"),
        ("model.layers.0.input_layernorm.weight", (128,), r"has shape \[128\], and config.json a hidden size of 256"),
        ("model.norm.weight", (64,), r"model.norm.weight has shape \[64\]"),
    ],
)
def test_an_ungathered_save_is_refused(
    name: str, shape: tuple[int, ...], words: str, make_checkpoint: MakeCheckpoint
) -> None:
    source = make_checkpoint(cut(name, shape), config=llama_config() | {"hidden_size": 256})
    with pytest.raises(InputError, match=words) as caught:
        fp8pack.pack(source, dry_run=True)
    assert "is a part of a checkpoint" in str(caught.value)
    assert "zero_to_fp32" in caught.value.hint


def test_norms_of_another_size_and_empty_buffers_are_no_parts(make_checkpoint: MakeCheckpoint) -> None:
    tensors = cut("model.layers.0.self_attn.q_norm.weight", (64,)) | {"model.empty": np.zeros((0,), ml_dtypes.bfloat16)}
    config = llama_config() | {"hidden_size": 256}
    assert fp8pack.pack(make_checkpoint(tensors, config=config), dry_run=True).num_packed


def test_names_are_looked_at_once_for_all_engines_and_remedies(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 99,000 weights it took 11 s when each engine and each trial of a remedy looked anew."""
    seen: list[str] = []
    monkeypatch.setattr("fp8pack.engines.case.wrapper_of", lambda name: seen.append(name) or "")
    result = fp8pack.pack(make_checkpoint(), dry_run=True, scheme="FP8_DYNAMIC")
    assert any(verdict.remedy for verdict in result.engines)
    assert len(seen) == len(set(seen)) == result.num_packed
