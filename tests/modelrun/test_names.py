"""From the names of a model in memory to those of its checkpoint."""

from pathlib import Path

import pytest
import torch
from calibration.tiny_models import EXPERTS, LAYERS, make_model, save_model
from safetensors import safe_open
from torch import nn

from fp8pack.modelrun.names import Names, is_transformers_model, names_of

FAMILIES = ("qwen3", "gpt_neox", "bert", "qwen3_moe", "mixtral", "gemma2", "gemma3", "gpt_oss", "llava", "t5")


def tensors_of(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_a_checkpoint_stands_behind_one_parameter(family: str, tmp_path: Path) -> None:
    model = make_model(family)
    saved = tensors_of(save_model(model, tmp_path / "model"))
    from_file, from_model = names_of(model, saved), names_of(model)
    found = [name for names in from_file.tensors.values() for name in names]
    assert saved == set(found)
    assert from_file.tensors.keys() <= model.state_dict().keys()
    for parameter, names in from_file.tensors.items():
        assert from_model.of_parameter(parameter) == names
    for parameter in model.state_dict().keys() - from_file.tensors.keys():  # tied ones are saved once
        value = model.state_dict()[parameter]
        others = [v for k, v in model.state_dict().items() if k in from_file.tensors]
        assert any(value.data_ptr() == other.data_ptr() for other in others), parameter


@pytest.mark.parametrize("family", FAMILIES)
def test_values_behind_a_parameter_have_its_size(family: str, tmp_path: Path) -> None:
    model = make_model(family)
    folder = save_model(model, tmp_path / "model")
    state = model.state_dict()
    with safe_open(folder / "model.safetensors", "pt") as file:
        sizes = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for parameter, names in names_of(model, sizes).tensors.items():
        parts = {name for name in names if sizes[name].ndim < state[parameter].ndim}
        total = sum(sizes[name].numel() for name in names)
        if parts:  # experts: the parts of gate_up_proj stand behind it
            assert total == state[parameter].numel(), parameter
        else:
            (name,) = names
            assert torch.equal(sizes[name], state[parameter]), parameter


@pytest.mark.parametrize(
    ("family", "prefix", "up", "down"),
    [
        ("qwen3_moe", "model.layers.1.mlp.experts", ("gate_proj", "up_proj"), "down_proj"),
        ("mixtral", "model.layers.1.block_sparse_moe.experts", ("w1", "w3"), "w2"),
        ("gpt_oss", "model.layers.1.mlp.experts", ("gate_proj", "up_proj"), "down_proj"),
    ],
)
def test_an_expert_of_a_fused_parameter_has_the_names_of_its_own_tensors(
    family: str, prefix: str, up: tuple[str, ...], down: str
) -> None:
    names = names_of(make_model(family))
    in_memory = "model.layers.1.mlp.experts"
    entering = [[f"{prefix}.{e}.{part}" for part in up] for e in range(EXPERTS)]
    assert names.of_experts(f"{in_memory}.gate_up_proj", EXPERTS) == entering
    assert names.of_experts(f"{in_memory}.down_proj", EXPERTS) == [[f"{prefix}.{e}.{down}"] for e in range(EXPERTS)]


def test_more_than_nine_experts_do_not_mix() -> None:
    parts = [f"a.experts.{e}.{part}.weight" for part in ("gate_proj", "up_proj") for e in range(12)]
    names = Names({"b.experts.gate_up_proj": parts})
    found = names.of_experts("b.experts.gate_up_proj", 12)
    assert found == [[f"a.experts.{e}.gate_proj", f"a.experts.{e}.up_proj"] for e in range(12)]


def test_places_without_tensors_follow_those_below_them() -> None:
    mixtral = names_of(make_model("mixtral"))
    assert mixtral.of_place("model.layers.2.self_attn") == "model.layers.2.self_attn"
    assert mixtral.of_place("model.layers.2.mlp") == "model.layers.2.block_sparse_moe"
    assert mixtral.of_linear("model.layers.2.mlp.gate") == ("model.layers.2.block_sparse_moe.gate",)
    neox = names_of(make_model("gpt_neox"))
    assert neox.of_linear("lm_head") == ("embed_out",)
    assert neox.of_linear("gpt_neox.layers.0.attention.dense") == ("gpt_neox.layers.0.attention.dense",)
    bert = names_of(make_model("bert"))
    assert bert.of_place("bert.encoder.layer.0.attention.self") == "bert.encoder.layer.0.attention.self"
    assert bert.of_linear("cls.predictions.decoder") == ("cls.predictions.decoder",)


def test_a_multimodal_model_bears_the_names_of_its_file(tmp_path: Path) -> None:
    model = make_model("llava")
    saved = tensors_of(save_model(model, tmp_path / "model"))
    names = names_of(model, saved)
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            for found in names.of_linear(path):
                assert f"{found}.weight" in saved or path == "lm_head", path
        if path.endswith("self_attn"):
            assert f"{names.of_place(path)}.q_proj.weight" in saved, path


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_a_checkpoint_with_or_without_the_prefix_of_the_base_model(prefix: str) -> None:
    """A file of the base model goes into one with a head, and the other way round: names stay those of the file."""
    base = names_of(make_model("bert_base")).tensors
    file = [f"{prefix}{name}" for names in base.values() for name in names]
    for family, inside in (("bert", "bert."), ("bert_base", "")):
        names = names_of(make_model(family), file)
        for layer in range(LAYERS):
            path = f"encoder.layer.{layer}.attention.self"
            assert names.of_parameter(f"{inside}{path}.query.weight") == (f"{prefix}{path}.query.weight",)
            assert names.of_linear(f"{inside}{path}.query") == (f"{prefix}{path}.query",)
            assert names.of_place(f"{inside}{path}") == f"{prefix}{path}"


def test_plain_modules_bear_their_own_names() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    assert not is_transformers_model(model)
    assert is_transformers_model(make_model("bert"))
    names = Names({"0.weight": ["x.y.weight"], "1.0.weight": ["u.q.weight", "u.k.weight"]})
    assert names.of_linear("0") == ("x.y",)
    assert names.of_linear("1.0") == ("u.q", "u.k")
    assert names.of_linear("2") == ("2",)
    assert names.of_place("3.norm") == "3.norm"
