"""`fp8pack.observe`: any module, any loop; nothing of the model changes, and everything is put back."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from inspect import signature
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from calibration.tiny_models import EXPERTS, HEADS, LAYERS, check_site, make_model, save_model
from safetensors import safe_open
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, StaticCache
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import fp8pack
from fp8pack.calibration.observers import Observation
from fp8pack.checkpoint.calibration_file import read_calibration
from fp8pack.errors import InputError
from fp8pack.modelrun.names import names_of
from fp8pack.modelrun.transformers_internals import CACHE_NAMES

K = 8


class OwnLinear(nn.Module):
    """A linear of somebody's own: it knows nothing of nn.Linear."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


class Mixer(nn.Module):
    """A norm, three linears that share what it leaves, and one that takes the result."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(K)
        self.a, self.b, self.c = OwnLinear(K, K), nn.Linear(K, K), nn.Linear(K, K, bias=False)
        self.out = OwnLinear(K, 4)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        result: Tensor = self.out(self.a(normed) * torch.sigmoid(self.b(normed)) + self.c(normed))
        return result


@contextmanager
def recorded(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """What enters and leaves every module of a model, copied: "<path>.input" and "<path>.output"."""
    seen: dict[str, list[Tensor]] = {}
    hooks = []

    def note(point: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any = None) -> None:
            value = args[0] if output is None else output
            if isinstance(value, Tensor):
                seen.setdefault(point, []).append(value.detach().clone().reshape(-1, value.shape[-1]))

        return hook

    for path, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(note(f"{path}.input")))
        hooks.append(module.register_forward_hook(note(f"{path}.output")))
    yield seen
    for hook in hooks:
        hook.remove()


def run_both(
    model: nn.Module, calls: list[Any], observation: Observation | None = None
) -> tuple[Observation, dict[str, list[Tensor]]]:
    """Run the calls unobserved, with plain hooks, and observed: outputs must be the same bits."""
    with recorded(model) as seen:
        expected = [model(call) for call in calls]
    observation = observation or fp8pack.observe(model)
    with observation:
        for call, wanted in zip(calls, expected, strict=True):
            assert torch.equal(model(call), wanted)
    return observation, seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@torch.no_grad()
def test_a_plain_module_in_any_dtype(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    model = Mixer().to(dtype)
    calls = [torch.randn(2, 5, K, dtype=dtype), torch.randn(1, 3, K, dtype=dtype) * 9]
    observation, seen = run_both(model, calls)
    calibration = observation.calibration()
    rows = [0] * 5 + [1] * 5 + [2] * 3
    assert len(set(calibration.prompts)) == 3
    assert sorted(calibration.by_point) == ["a.input", "b.input", "c.input", "norm.output", "out.input"]
    for point, values in seen.items():
        if point in calibration.by_point:
            check_site(calibration.by_point[point], torch.cat(values), rows, 3)
    together = frozenset({"norm.output", "a.input", "b.input", "c.input"})
    assert {frozenset(site.points) for site in calibration.sites} == {together, frozenset({"out.input"})}


@torch.no_grad()
def test_an_input_of_two_dimensions_counts_every_row() -> None:
    """[T, K]: however its rows are told apart as prompts, every value counts once."""
    torch.manual_seed(1)
    model = Mixer()
    observation, seen = run_both(model, [torch.randn(5, K), torch.randn(7, K)])
    calibration = observation.calibration()
    for point in ("norm.output", "out.input"):
        site, values = calibration.by_point[point], torch.cat(seen[point]).bfloat16().float()
        assert site.tokens == 12
        assert site.counts.sum() == 12 * K
        assert site.amax == values.abs().max().item()
        assert site.prompt_amax.size == len(calibration.prompts)
        np.testing.assert_array_equal(site.channel_squares, np.add.accumulate(values.double().numpy() ** 2)[-1])
        assert site.prompt_amax.max() == site.channel_amax.max()


@torch.no_grad()
def test_rows_of_a_two_dimensional_input_keep_their_own_amax() -> None:
    """If each row of [B, K] is a prompt, its amax is its own; if they are one prompt, there is one."""
    model = nn.Sequential(nn.Linear(K, K, bias=False))
    x = torch.full((3, K), 0.5)
    x[1] = 64.0
    with fp8pack.observe(model) as observation:
        model(x)
    (site,) = observation.calibration().sites
    amax = [value << 16 for value in site.prompt_amax.tolist()]
    found = np.array(amax, np.uint32).view(np.float32).tolist()
    assert found in ([0.5, 64.0, 0.5], [64.0])


class Convolutions(nn.Module):
    """Images to a class: its tensors are no rows of tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(3, K, 4, stride=4)
        self.norm = nn.LayerNorm(K)
        self.mix = nn.Linear(K, K)
        self.head = nn.Linear(K, 2)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        result: Tensor = self.head(self.mix(self.norm(tokens)).mean(1))
        return result


@torch.no_grad()
def test_inputs_like_those_of_convolutions() -> None:
    torch.manual_seed(1)
    model = Convolutions()
    observation, seen = run_both(model, [torch.randn(2, 3, 8, 8), torch.randn(1, 3, 16, 8)])
    calibration = observation.calibration()
    assert len(calibration.prompts) == 3
    assert sorted(calibration.by_point) == ["head.input", "mix.input", "norm.output"]
    for point, tokens in (("mix.input", 2 * 4 + 8), ("head.input", 3)):
        site, values = calibration.by_point[point], torch.cat(seen[point]).bfloat16().float()
        assert site.tokens == tokens
        assert site.amax == values.abs().max().item()
        assert site.prompt_amax.all()


class Loop(nn.Module):
    """One linear that is called several times, with something else each time."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.norm, self.linear = nn.LayerNorm(K), nn.Linear(K, K)
        self.second = nn.Linear(K, K)

    def forward(self, x: Tensor) -> Tensor:
        match self.how:
            case "norm first":
                return self.linear(torch.tanh(self.linear(self.norm(x)))) + self.second(x)
            case "norm last":
                return self.linear(self.norm(self.linear(x))) + self.second(x)
            case "norm twice":
                return self.linear(self.norm(self.linear(self.norm(x)) * 3))
            case "now together, now apart":
                normed = self.norm(x)
                together = self.linear(normed) + self.second(normed)
                return together + self.second(torch.tanh(together) * 7) + self.linear(x * 2)
            case "skipped at times":
                normed = self.norm(x)
                return self.linear(normed) if x.abs().max() > 4 else self.second(normed)
            case "changed in place":
                normed = self.norm(x)
                first = self.linear(normed)
                normed.mul_(3.0)
                return first + self.second(normed)
            case "activation in place":
                normed = self.norm(x)
                return self.linear(nn.functional.relu_(normed))
            case "other view":
                normed = self.norm(x)
                return self.linear(normed) + self.second(normed.view(-1, K)).view(normed.shape)
            case "other order":
                normed = self.norm(x)
                return self.linear(normed) + self.second(normed.transpose(0, 1)).transpose(0, 1)
            case "half of it":
                normed = self.norm(x)
                return self.linear(normed) + self.second(normed[:, :1]).sum(1, keepdim=True)
        raise ValueError(self.how)


@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode, torch.enable_grad], ids=lambda mode: mode.__name__
)
@pytest.mark.parametrize(
    "how",
    [
        *("norm first", "norm last", "norm twice", "now together, now apart", "skipped at times", "other view"),
        *("changed in place", "activation in place", "other order", "half of it"),
    ],
)
def test_each_point_holds_what_passed_it_and_nothing_else(how: str, mode: Any) -> None:
    """Whatever enters several modules is kept once, but never what entered only one of them."""
    torch.manual_seed(1)
    model = Loop(how)
    with mode():
        observation, seen = run_both(model, [torch.randn(1, 5, K), torch.randn(1, 5, K) * 4])
    calibration = observation.calibration()
    assert sorted(calibration.by_point) == [
        point for point in ("linear.input", "norm.output", "second.input") if point in seen
    ]
    for point, site in calibration.by_point.items():
        parts = seen[point]
        calls = [2 * i // len(parts) for i in range(len(parts))]
        if how == "skipped at times" and len(parts) == 1:
            calls = [int(point == "linear.input")]
        rows = np.concatenate([[call] * len(part) for call, part in zip(calls, parts, strict=True)])
        magnitudes = torch.cat(parts).detach().bfloat16().float().abs()
        assert site.tokens == len(rows), point
        assert site.amax == magnitudes.max().item(), point
        for prompt in (0, 1):
            expected = max(magnitudes[torch.from_numpy(rows == prompt)].flatten().tolist(), default=0.0)
            assert np.uint32(int(site.prompt_amax[prompt]) << 16).view(np.float32) == expected, point
        if how != "other order":  # of rows, which here only changes the order of a sum
            check_site(site, torch.cat(parts), rows, 2)


@torch.no_grad()
def test_names_tell_what_a_module_is_called_in_the_checkpoint() -> None:
    model = Mixer()
    names: dict[str, str | list[str]] = {
        "a.weight": ["model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"],
        "b.weight": "model.layers.0.self_attn.v_proj.weight",
        "norm.weight": "model.layers.0.input_layernorm.weight",
    }
    with fp8pack.observe(model, names=names) as observation:
        model(torch.ones(1, 2, K))
    layer = "model.layers.0"
    assert set(observation.calibration().by_point) == {
        *(f"{layer}.self_attn.{part}_proj.input" for part in "qkv"),
        f"{layer}.input_layernorm.output",
        *("c.input", "out.input"),
    }


@torch.no_grad()
def test_the_same_call_twice_is_two_prompts_and_a_saved_file_reads_back(tmp_path: Path) -> None:
    model, x = Mixer(), torch.randn(2, 3, K)
    with fp8pack.observe(model) as observation:
        model(x)
        model(x)
    observation.save(tmp_path / "c.safetensors")
    found = read_calibration(tmp_path / "c.safetensors")
    assert len(set(found.prompts)) == 4
    assert found.by_point["out.input"].tokens == 12
    assert found.by_point["out.input"].prompt_amax[:2].tolist() == found.by_point["out.input"].prompt_amax[2:].tolist()


@torch.no_grad()
def test_observing_goes_on_when_it_is_entered_again() -> None:
    model, observation = Mixer(), None
    observation = fp8pack.observe(model)
    for _ in range(2):
        with observation:
            model(torch.ones(1, 3, K))
        model(torch.ones(1, 3, K))
    assert observation.calibration().by_point["out.input"].tokens == 6


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@torch.no_grad()
def test_a_value_that_is_not_finite_is_refused_with_the_place_and_the_prompt(bad: float) -> None:
    model = nn.Sequential(nn.Linear(K, K), nn.Linear(K, 2))
    model[0].weight.zero_()
    x = torch.ones(1, 3, K)
    with fp8pack.observe(model) as observation:
        model(x)
        x[0, 1, 2] = bad
        model(x)
    with pytest.raises(InputError, match=r"0\.input is NaN or infinite in prompt 2 \(blake3:"):
        observation.calibration()


@torch.no_grad()
def test_what_stands_at_padded_positions_counts_nowhere_even_if_it_is_no_number() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(K, K)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            result: Tensor = self.linear(x.masked_fill(attention_mask[..., None] == 0, float("nan")))
            return result

    x = torch.randn(2, 4, K)
    for kind in (torch.bool, torch.int64, torch.float32):
        mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]]).to(kind)
        model = Masked()
        with fp8pack.observe(model) as observation:
            model(x, attention_mask=mask)
        (site,) = observation.calibration().sites
        check_site(site, x.reshape(-1, K), [-1, -1, 0, 0, 1, 1, 1, -1], 2)


def test_gradients_flow_as_ever() -> None:
    model, x = Mixer(), torch.randn(1, 3, K)
    model(x).sum().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    with fp8pack.observe(model):
        model(x).sum().backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, gradient)


def state_of(model: nn.Module) -> dict[str, Any]:
    """All that observing might leave behind."""
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    return {
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "own": [sorted(key for key in vars(m) if key == "forward") for m in model.modules()],
        "attention": [config._attn_implementation for config in configs],
        "experts": [getattr(config, "_experts_implementation", None) for config in configs],
        "registries": [
            sorted(registry.valid_keys())
            for registry in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS, ALL_EXPERTS_FUNCTIONS)
        ],
    }


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["qwen3_moe", "llava"])
@torch.no_grad()
def test_everything_is_put_back_also_after_an_error(family: str, attention: str) -> None:
    model = make_model(family, attn_implementation=attention)
    if family == "qwen3_moe":
        model.set_experts_implementation("eager" if attention == "eager" else "batched_mm")
    before = state_of(model)
    with fp8pack.observe(model):
        assert state_of(model) != before
        model(torch.tensor([[5, 6, 7]]))
    assert state_of(model) == before
    with pytest.raises(KeyError, match="the loop"), fp8pack.observe(model):
        model(torch.tensor([[5, 6, 7]]))
        raise KeyError("the loop")
    assert state_of(model) == before
    with pytest.raises(IndexError), fp8pack.observe(model):
        model(torch.tensor([[5, 60000]]))
    assert state_of(model) == before


def register_another_attention(undo: ExitStack) -> None:
    """Have an attention `kernel` as the kernels of the Hub are, computed eagerly."""

    def kernel(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return vars(sys.modules[type(module).__module__])["eager_attention_forward"](module, *args, **kwargs)

    for registry, function in (
        (ALL_ATTENTION_FUNCTIONS, kernel),
        (ALL_MASK_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS["eager"]),
    ):
        registry.register("kernel", function)
        undo.callback(type(registry)._global_mapping.pop, "kernel")


@torch.no_grad()
def test_a_kernel_that_cannot_be_observed_is_replaced_by_sdpa() -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    with ExitStack() as undo:
        register_another_attention(undo)
        model = make_model("qwen3", attn_implementation="sdpa")
        expected = model(ids).logits
        model.set_attn_implementation("kernel")
        with fp8pack.observe(model) as observation:
            assert "_sdpa_" in model.config._attn_implementation
            assert torch.equal(model(ids).logits, expected)
        assert model.config._attn_implementation == "kernel"
    assert "model.layers.0.self_attn.k" in observation.calibration().by_point


@torch.no_grad()
def test_where_sdpa_cannot_stand_in_it_is_eager_and_that_is_said_once() -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    with ExitStack() as undo:
        register_another_attention(undo)
        model = make_model("gemma2")
        model.set_attn_implementation("kernel")
        expected = model(ids).logits
        with pytest.warns(UserWarning, match="does not support sdpa to replace kernel") as said, fp8pack.observe(model):
            for _ in range(2):
                assert torch.equal(model(ids).logits, expected)
    assert len(said) == 1


@pytest.mark.parametrize("setter", ["set_attn_implementation", "set_experts_implementation"])
def test_nothing_stays_behind_when_observing_cannot_begin(setter: str) -> None:
    model = make_model("qwen3_moe")
    before = state_of(model)
    with (
        patch.object(type(model), setter, side_effect=RuntimeError("on the way in")),
        pytest.raises(RuntimeError, match="on the way in"),
        fp8pack.observe(model),
    ):
        pass
    assert state_of(model) == before


@pytest.mark.parametrize("family", ["qwen3", "gpt_neox", "bert", "gemma2", "gemma3", "gpt_oss", "qwen3_moe", "mixtral"])
@torch.no_grad()
def test_observed_logits_are_the_bits_of_unobserved_ones(family: str) -> None:
    model = make_model(family)
    if family in ("gpt_oss", "qwen3_moe", "mixtral"):
        model.set_experts_implementation("eager")
    calls = [
        {"input_ids": torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]])},
        {"input_ids": torch.tensor([[5, 6, 7], [8, 1, 1]]), "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 0]])},
    ]
    expected = [model(**call).logits for call in calls]
    with fp8pack.observe(model) as observation:
        found = [model(**call).logits for call in calls]
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    assert len(observation.calibration().prompts) == 3


@contextmanager
def cached_states() -> Iterator[dict[int, list[tuple[Tensor, Tensor]]]]:
    """The K and V that are added to a cache, for each layer."""
    seen: dict[int, list[tuple[Tensor, Tensor]]] = {}
    update = DynamicCache.update

    def watched(cache: Any, key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any) -> Any:
        seen.setdefault(layer, []).append((key.clone(), value.clone()))
        return update(cache, key, value, layer, *args, **kwargs)

    with patch.object(DynamicCache, "update", watched):
        yield seen


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("family", ["qwen3", "gemma3", "gpt_neox"])
def test_a_loop_that_generates_counts_each_token_once(family: str, batch: int) -> None:
    """Tokens whose K and V are cached passed in an earlier call; sliding windows forget some of them."""
    model = make_model(family)
    ids = torch.tensor([[5, 6, 7, 8, 9], [1, 1, 17, 18, 19]])[:batch]
    options = {"attention_mask": (ids != 1).long(), "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    expected = model.generate(ids, pad_token_id=1, **options)
    with fp8pack.observe(model) as observation, cached_states() as cached:
        generated = model.generate(ids, pad_token_id=1, **options)
    assert torch.equal(generated, expected)
    calibration = observation.calibration()
    assert len(calibration.prompts) == 8 * batch
    rows: list[int] = [-1 if token == 1 else row for row, prompt in enumerate(ids.tolist()) for token in prompt]
    rows += range(batch, 8 * batch)
    base = "gpt_neox.layers.{}.attention" if family == "gpt_neox" else "model.layers.{}.self_attn"
    for layer in range(LAYERS):
        for kind, index in (("k", 0), ("v", 1)):
            values = [states[index].transpose(1, 2).flatten(2).flatten(0, 1) for states in cached[layer]]
            check_site(calibration.by_point[f"{base.format(layer)}.{kind}"], torch.cat(values), rows, 8 * batch)


@torch.no_grad()
def test_a_static_cache_counts_what_is_new_in_it() -> None:
    """Its keys have room for tokens that never came."""
    model = make_model("qwen3")
    steps = [torch.tensor([[5, 6, 7, 8, 9]]), torch.tensor([[10]]), torch.tensor([[11, 12]])]
    name = next(name for name in CACHE_NAMES if name in signature(type(model).forward).parameters)

    def run(cache: Any) -> Any:
        with fp8pack.observe(model) as observation:
            done = 0
            for ids in steps:
                positions = torch.arange(done, done + ids.shape[1])[None]
                model(ids, **{name: cache}, use_cache=True, position_ids=positions)
                done += ids.shape[1]
        return observation.calibration().by_point

    expected = run(DynamicCache(config=model.config))
    found = run(StaticCache(config=model.config, max_cache_len=32))
    for kind in "kv":
        point = f"model.layers.0.self_attn.{kind}"  # of the first layer, whose input no attention has touched
        assert expected[point].tokens == 8
        assert found[point].tokens == 8
        np.testing.assert_array_equal(found[point].bins, expected[point].bins)
        np.testing.assert_array_equal(found[point].counts, expected[point].counts)


@torch.no_grad()
def test_as_many_tokens_as_heads_are_still_tokens() -> None:
    """Gemma 3 norms Q and K as [B, heads, T, K], and T may be the number of heads."""
    model = make_model("gemma3")
    ids = torch.tensor([list(range(5, 5 + HEADS)), [20, 21, *[1] * (HEADS - 2)]])
    path = "model.layers.1.self_attn.q_norm"
    outputs: list[Tensor] = []
    hook = model.get_submodule(path).register_forward_hook(lambda module, args, output: outputs.append(output.clone()))
    with fp8pack.observe(model) as observation:
        model(ids, attention_mask=(ids != 1).long())
    hook.remove()
    rows = np.array([[0] * HEADS, [1, 1, *[-1] * (HEADS - 2)]]).reshape(-1).repeat(HEADS)
    values = outputs[0].transpose(1, 2).reshape(-1, outputs[0].shape[-1])
    check_site(observation.calibration().by_point[f"{path}.output"], values, rows, 2)


def test_inference_mode_records_the_same() -> None:
    model = make_model("qwen3")
    ids = torch.tensor([[5, 6, 7, 8]])
    found = []
    for inference in (True, False):
        with torch.inference_mode(inference), torch.no_grad(), fp8pack.observe(model) as observation:
            model(ids.clone())
        found.append(observation.calibration().by_point)
    assert found[0].keys() == found[1].keys()
    for point, site in found[0].items():
        for field in ("bins", "counts", "channel_amax", "channel_squares", "prompt_amax"):
            np.testing.assert_array_equal(getattr(site, field), getattr(found[1][point], field), point)


@torch.no_grad()
def test_a_multimodal_model_in_the_users_loop(tmp_path: Path) -> None:
    model = make_model("llava")
    folder = save_model(model, tmp_path / "model")
    image = torch.randn(1, 3, 28, 28).bfloat16()
    ids = torch.tensor([[5, *[260] * 4, 6, 7]])
    expected = [model(ids, pixel_values=picture).logits for picture in (image, image * 2)]
    with fp8pack.observe(model) as observation:
        found = [model(ids, pixel_values=picture).logits for picture in (image, image * 2)]
        model(torch.tensor([[8, 9]]))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    observation.save(tmp_path / "c.safetensors", model=folder)
    calibration = read_calibration(tmp_path / "c.safetensors")
    assert calibration.fingerprint
    assert len(set(calibration.prompts)) == 3
    with safe_open(folder / "model.safetensors", "pt") as file:
        modules = {name.rpartition(".")[0] for name in file.keys()}  # noqa: SIM118
    points = {point for point in calibration.by_point if not point.endswith((".k", ".v"))}
    assert {point.rpartition(".")[0] for point in points} <= modules | {"lm_head", "language_model.lm_head"}
    layers = [point for point in points if point.endswith("layers.0.self_attn.q_proj.input")]
    assert len(layers) == 2  # of the tower and of the language model
    text = next(point for point in layers if "language_model" in point)
    tower = next(point for point in layers if "vision" in point)
    assert calibration.by_point[text].tokens == 7 + 7 + 2
    assert calibration.by_point[tower].tokens == 2 * 5
    assert calibration.by_point[tower].prompt_amax[2] == 0
    assert calibration.by_point[text.replace("q_proj.input", "k")].tokens == 16


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@torch.no_grad()
def test_all_experts_hold_what_each_would_see_of_every_token(family: str) -> None:
    model = make_model(family)
    model.set_experts_implementation("eager")
    ids = torch.tensor([[5, 6, 7, 8, 9], [17, 18, 19, 1, 1]])
    mask = (ids != 1).long()
    entering: list[Tensor] = []
    path = "model.layers.1.mlp.experts"
    module = model.get_submodule(path)
    expected = model(ids, attention_mask=mask).logits
    hook = module.register_forward_pre_hook(lambda module, args: entering.append(args[0].clone()))
    with Observation(model, names_of(model), all_experts=True) as observation:
        logits = model(ids, attention_mask=mask).logits
    hook.remove()
    assert family == "gpt_oss" or torch.equal(logits, expected)
    calibration = observation.calibration()
    rows = [0] * 5 + [1, 1, 1, -1, -1]
    (hidden,) = entering
    hidden = hidden.reshape(10, -1)
    for e in range(EXPERTS):
        if family == "gpt_oss":
            both = hidden @ module.gate_up_proj[e] + module.gate_up_proj_bias[e]
            gate, up = both[:, ::2].clamp(max=module.limit), both[:, 1::2].clamp(-module.limit, module.limit)
            inner = (up + 1) * (gate * torch.sigmoid(gate * module.alpha))
        else:
            gate, up = nn.functional.linear(hidden, module.gate_up_proj[e]).chunk(2, -1)
            inner = nn.functional.silu(gate) * up
        sites = calibration.all_experts_by_point
        check_site(sites[f"{path}.{e}.gate_proj.input"], hidden, rows, 2)
        check_site(sites[f"{path}.{e}.up_proj.input"], hidden, rows, 2)
        if family == "gpt_oss":  # rounded at other places than a fused addition of the bias
            site = sites[f"{path}.{e}.down_proj.input"]
            assert site.tokens == 8
            assert site.amax == pytest.approx(inner[np.array(rows) >= 0].abs().max().item(), rel=0.02)
        else:
            check_site(sites[f"{path}.{e}.down_proj.input"], inner, rows, 2)
    routed = [calibration.by_point.get(f"{path}.{e}.down_proj.input") for e in range(EXPERTS)]
    assert sum(site.tokens for site in routed if site) == 2 * 8  # of each token, two experts
    with fp8pack.observe(model) as observation:
        model(ids, attention_mask=mask)
    assert observation.calibration().all_experts == ()
    assert [site.points for site in observation.calibration().sites] == [site.points for site in calibration.sites]


@torch.no_grad()
def test_calling_a_part_of_the_observed_model_says_what_to_call() -> None:
    model = Mixer()
    with fp8pack.observe(model), pytest.raises(RuntimeError, match="call the model that is observed"):
        model.out(torch.ones(1, 2, K))


@torch.no_grad()
def test_a_call_that_fails_leaves_nothing_that_disturbs_the_next() -> None:
    model = make_model("qwen3")
    with fp8pack.observe(model) as observation:
        with pytest.raises(IndexError):
            model(torch.tensor([[5, 60000]]))
        model(torch.tensor([[5, 6, 7]]))
    assert observation.calibration().by_point["model.norm.output"].tokens == 3


@torch.no_grad()
def test_an_empty_batch_of_an_expert_counts_nothing() -> None:
    """Experts in a ModuleList, as models with code of their own have them."""

    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(K, K) for _ in range(2)])

        def forward(self, x: Tensor) -> Tensor:
            first = x[..., 0] > 0
            result = torch.empty_like(x)
            for expert, chosen in zip(self.experts, (first, ~first), strict=True):
                result[chosen] = expert(x[chosen])
            return result

    x = torch.randn(1, 6, K)
    x[..., 0] = 1.0
    with fp8pack.observe(Routed()) as observation:
        observation._model(x)
        x[:, :2, 0] = -1.0
        observation._model(x)
    by_point = observation.calibration().by_point
    assert (by_point["experts.0.input"].tokens, by_point["experts.1.input"].tokens) == (6 + 4, 2)
    assert by_point["experts.1.input"].prompt_amax[0] == 0
