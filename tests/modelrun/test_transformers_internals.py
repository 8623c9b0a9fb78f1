"""Each name of transformers that it does not document, used as we use it: a release that moves one fails here."""

import ast
import inspect
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from calibration.tiny_models import make_model, save_model
from torch import Tensor
from transformers import DynamicCache, StaticCache

from fp8pack.modelrun import transformers_internals as internals
from fp8pack.modelrun.names import is_transformers_model

PACKAGE = Path(internals.__file__).parents[1]
DOCUMENTED = {"transformers", "transformers.utils"}  # the second for its logging


def test_no_other_file_touches_what_is_not_documented() -> None:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        modules = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        theirs = {name for name in modules if name.partition(".")[0] == "transformers"} - DOCUMENTED
        if theirs and path != Path(internals.__file__):
            found[path.name] = theirs
    assert not found


def test_the_version_is_one_that_is_supported() -> None:
    assert transformers.__version__.partition(".")[0] == "5"


def test_names_in_memory_and_in_the_checkpoint() -> None:
    """A mixture of experts: single experts of the file become one parameter, and come apart again."""
    model = make_model("qwen3_moe")
    pairs = list(internals.renamed(model, None))
    assert {parameter for parameter, _ in pairs} <= set(model.state_dict())
    made = [name for parameter, name in pairs if parameter.endswith("layers.0.mlp.experts.gate_up_proj")]
    assert any(name.endswith("experts.0.gate_proj.weight") for name in made)
    assert list(internals.renamed(model, [name for _, name in pairs])) == pairs


def test_a_model_is_made_and_given_its_weights(tmp_path: Path) -> None:
    model = make_model("qwen3")
    save_model(model, tmp_path)
    with internals.no_init_weights():
        empty = internals.make_model(type(model), model.config, torch.bfloat16)
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    info = internals.load_tensors(empty, tensors, torch.device("cpu"), torch.bfloat16)
    assert not info.mismatched_keys
    assert not info.conversion_errors
    for name, tensor in empty.state_dict().items():
        assert torch.equal(tensor, tensors[name]), name


def test_a_shape_that_differs_is_told(tmp_path: Path) -> None:
    model = make_model("qwen3")
    tensors = dict(model.state_dict()) | {"model.norm.weight": torch.ones(3)}
    empty = internals.make_model(type(model), model.config, torch.bfloat16)
    info = internals.load_tensors(empty, tensors, torch.device("cpu"), torch.bfloat16)
    assert [name for name, *_ in info.mismatched_keys] == ["model.norm.weight"]


def test_attention_is_replaced_and_put_back() -> None:
    model = make_model("qwen3")
    ids, seen = torch.tensor([[5, 6, 7]]), []
    base = internals.implementations(model, "attn")[""]
    with torch.no_grad():
        expected = model(ids).logits

    def attention(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(query.shape[2])
        return internals.attention_of(module, base)(module, query, *args, **kwargs)

    assert internals.takes_attention(model)
    assert internals.supports_sdpa(model)
    with ExitStack() as undo, torch.no_grad():
        internals.add_attention("fp8pack_test", base, attention, undo)
        model.set_attn_implementation("fp8pack_test")
        assert torch.equal(model(ids).logits, expected)
        model.set_attn_implementation(base)
    assert seen == [3] * model.config.num_hidden_layers
    with pytest.raises((ValueError, KeyError, ImportError)):
        model.set_attn_implementation("fp8pack_test")


def test_eager_attention_is_beside_its_class() -> None:
    model = make_model("qwen3")
    assert callable(internals.attention_of(model.get_submodule("model.layers.0.self_attn"), "eager"))


def test_experts_are_replaced_and_run_as_theirs() -> None:
    model = make_model("qwen3_moe")
    ids, seen = torch.tensor([[5, 6, 7]]), []
    modules = [module for module in model.modules() if internals.is_experts(module)]
    assert len(modules) == model.config.num_hidden_layers

    def experts(module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        seen.append(hidden.shape[0])
        result = torch.zeros_like(hidden)
        for token in range(hidden.shape[0]):
            for slot in range(index.shape[1]):
                expert = int(index[token, slot])
                up = torch.nn.functional.linear(hidden[token], module.gate_up_proj[expert])
                inner = internals.activate_expert(module, up)
                down = torch.nn.functional.linear(inner, module.down_proj[expert])
                result[token] += internals.norm_expert(module, down) * weights[token, slot]
        return result

    model.set_experts_implementation("eager")
    before = internals.implementations(model, "experts")
    with ExitStack() as undo, torch.no_grad():
        expected = model(ids).logits
        internals.add_experts("fp8pack_test", experts, undo)
        model.set_experts_implementation("fp8pack_test")
        torch.testing.assert_close(model(ids).logits, expected, rtol=2**-6, atol=2**-6)
        model.set_experts_implementation(before[""])
    assert seen == [3] * len(modules)


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@torch.no_grad()
def test_a_cache_tells_how_many_tokens_it_holds(kind: Any) -> None:
    model = make_model("qwen3")
    name = next(name for name in internals.CACHE_NAMES if name in inspect.signature(type(model).forward).parameters)
    cache = kind(config=model.config) if kind is DynamicCache else kind(config=model.config, max_cache_len=16)
    assert internals.num_cached_tokens({name: cache}) == 0
    model(torch.tensor([[5, 6, 7]]), **{name: cache}, use_cache=True)
    assert internals.num_cached_tokens({name: cache}) == 3
    assert internals.num_cached_tokens({}) is None
    assert internals.num_cached_tokens({name: ((torch.zeros(1), torch.zeros(1)),)}) is None


@torch.no_grad()
def test_a_loop_that_generates_hands_its_cache_over_by_a_name_that_is_known() -> None:
    model, names = make_model("qwen3"), set()
    model.register_forward_pre_hook(lambda module, args, kwargs: names.update(kwargs), with_kwargs=True)
    model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, do_sample=False, pad_token_id=1)
    assert names & set(internals.CACHE_NAMES)


def test_models_are_known_by_where_their_base_is_defined() -> None:
    assert is_transformers_model(make_model("qwen3"))
    assert not is_transformers_model(torch.nn.Linear(2, 2))


def test_a_quantizer_can_be_registered() -> None:
    """`import fp8pack.transformers` does it."""
    import fp8pack.transformers as ours

    assert issubclass(ours.FP8PackQuantizer, internals.HfQuantizer)
    assert issubclass(ours.FP8PackConfig, internals.QuantizationConfigMixin)
    assert callable(internals.register_quantizer)
    assert callable(internals.register_quantization_config)
    assert callable(internals.get_class_from_dynamic_module)
