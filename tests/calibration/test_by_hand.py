"""What a calibration records equals, exactly, what hooks written by hand see in the same model.

By hand, each matrix that is multiplied by is known by where its memory lies: whatever reaches
torch.nn.functional.linear with it, entered it.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import transformers
import verbs
from calibration.tiny_models import (
    EXPERTS,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    LAYERS,
    TEXTS,
    check_site,
    make_model,
    save_model,
    write_prompts,
)
from checkpoints import DEMO
from numpy.typing import NDArray

from fp8pack.calibration.calibrate import calibrate
from fp8pack.calibration.options import CalibrateOptions
from fp8pack.checkpoint.calibration_file import read_calibration
from fp8pack.modelrun.prompts import load_prompts, tokenize
from fp8pack.planning.calibration import Calibration

BUILT_IN = DEMO.parents[1] / "calib_prompts" / "prompts.jsonl"
Batches = list[tuple[list[int], dict[str, torch.Tensor]]]


@dataclass
class ByHand:
    """The rows that passed each point, and the prompt of each."""

    seen: dict[str, list[tuple[torch.Tensor, NDArray[np.int64]]]] = field(default_factory=lambda: defaultdict(list))
    rows: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    def add(self, points: list[str], value: torch.Tensor, rows: NDArray[np.int64] | None = None) -> None:
        assert value.dtype == torch.bfloat16
        values = value.detach().reshape(-1, value.shape[-1]).clone()
        rows = np.repeat(self.rows, len(values) // len(self.rows)) if rows is None else rows
        for point in points:
            self.seen[point].append((values, rows))

    def check(self, calibration: Calibration, num_prompts: int) -> None:
        assert len(calibration.prompts) == num_prompts
        assert sorted(calibration.by_point) == sorted(self.seen)
        for point, parts in self.seen.items():
            values, rows = torch.cat([part[0] for part in parts]), np.concatenate([part[1] for part in parts])
            check_site(calibration.by_point[point], values, rows, num_prompts)


def run_by_hand(
    model: Any,
    batches: Batches,
    points_of: Mapping[str, list[str]],
    kv_points: list[str],
    capture: Callable[[Any, ByHand, list[str]], Any],
) -> ByHand:
    """Run the model.

    points_of: for each parameter that multiplies, and for each norm, where it stands in the checkpoint; for a 3-D
        parameter, as "name[index]".
    kv_points: <attention> of each layer, in order.
    """
    hand = ByHand()
    matrices: dict[int, tuple[list[str], str]] = {}
    routed: dict[str, torch.Tensor] = {}
    hooks = []
    for name, points in points_of.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "output":
            hooks.append(model.get_submodule(module).register_forward_hook(_norm_hook(hand, points)))
        elif "[" in leaf:
            parameter, index = leaf.rstrip("]").split("[")
            weight = getattr(model.get_submodule(module), parameter)[int(index)]
            matrices[weight.data_ptr()] = points, f"{module}[{index}]"
        else:
            matrices[model.get_parameter(name).data_ptr()] = points, ""
    for path, module in model.named_modules():
        if path.endswith(".experts"):
            hooks.append(module.register_forward_pre_hook(_router_hook(routed, path)))
    linear = torch.nn.functional.linear

    def watched(value: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        points, expert = matrices[weight.data_ptr()]
        hand.add(points, value, hand.rows[routed[expert].numpy()] if expert else None)
        return linear(value, weight, bias)

    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(patch.object(torch.nn.functional, "linear", watched))
        stack.enter_context(capture(model, hand, kv_points))
        first = 0
        for lengths, call in batches:
            longest = max(lengths)
            rows = [[first + i] * length + [-1] * (longest - length) for i, length in enumerate(lengths)]
            hand.rows = np.array(rows, np.int64).reshape(-1)
            model(use_cache=False, **call) if hasattr(model.config, "use_cache") else model(**call)
            first += len(lengths)
    for hook in hooks:
        hook.remove()
    return hand


def _norm_hook(hand: ByHand, points: list[str]) -> Callable[..., None]:
    return lambda module, args, output: hand.add(points, output)


def _router_hook(routed: dict[str, torch.Tensor], path: str) -> Callable[..., None]:
    def hook(module: Any, args: tuple[Any, ...]) -> None:
        for expert in range(module.num_experts):  # in the order of the eager forward: first choices first
            routed[f"{path}[{expert}]"] = (expert == args[1].T).nonzero()[:, 1]

    return hook


@contextmanager
def watched_sdpa(model: Any, hand: ByHand, kv_points: list[str]) -> Iterator[None]:
    """See K and V in scaled_dot_product_attention, once for each layer."""
    original = torch.nn.functional.scaled_dot_product_attention
    calls = 0

    def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        nonlocal calls
        point = kv_points[calls % len(kv_points)]
        calls += 1
        config = model.config
        kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        for kind, states in (("k", key), ("v", value)):  # [B, heads, T, D], a KV head repeated for its queries
            heads = states[:, :: states.shape[1] // kv_heads]
            hand.add([f"{point}.{kind}"], heads.permute(0, 2, 1, 3).flatten(2))
        return original(query, key, value, **kwargs)

    with patch.object(torch.nn.functional, "scaled_dot_product_attention", attention):
        yield
    assert calls
    assert calls % len(kv_points) == 0


@contextmanager
def watched_eager(model: Any, hand: ByHand, kv_points: list[str]) -> Iterator[None]:
    """See K and V in the eager attention of a model."""
    place = "transformers.models.gemma2.modeling_gemma2.eager_attention_forward"
    original = transformers.models.gemma2.modeling_gemma2.eager_attention_forward

    def attention(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **kw: Any
    ) -> Any:
        for kind, states in (("k", key), ("v", value)):
            hand.add([f"{kv_points[module.layer_idx]}.{kind}"], states.permute(0, 2, 1, 3).flatten(2))
        return original(module, query, key, value, *rest, **kw)

    with patch(place, attention):
        yield


def same(*names: str) -> dict[str, list[str]]:
    """Linears that bear their own name in the checkpoint."""
    return {f"{name}.weight": [f"{name}.input"] for name in names}


def norms(*names: str) -> dict[str, list[str]]:
    """Norms that bear their own name in the checkpoint."""
    return {f"{name}.output": [f"{name}.output"] for name in names}


def llama_like(layers: int, *more_norms: str, mlp: bool = True) -> dict[str, list[str]]:
    """Linears and norms of a model like Llama."""
    found = same("lm_head") | norms("model.norm")
    for i in range(layers):
        layer = f"model.layers.{i}"
        found |= same(*(f"{layer}.self_attn.{part}_proj" for part in "qkvo"))
        found |= same(*(f"{layer}.mlp.{part}_proj" for part in ("gate", "up", "down"))) if mlp else {}
        found |= norms(*(f"{layer}.{norm}" for norm in ("input_layernorm", "post_attention_layernorm", *more_norms)))
    return found


def neox_places() -> dict[str, list[str]]:
    found = {"lm_head.weight": ["embed_out.input"]} | norms("gpt_neox.final_layer_norm")
    for i in range(LAYERS):
        layer = f"gpt_neox.layers.{i}"
        found |= same(f"{layer}.attention.query_key_value", f"{layer}.attention.dense")
        found |= same(f"{layer}.mlp.dense_h_to_4h", f"{layer}.mlp.dense_4h_to_h")
        found |= norms(f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm")
    return found


def bert_places() -> dict[str, list[str]]:
    found = same("cls.predictions.transform.dense", "cls.predictions.decoder")
    found |= norms("bert.embeddings.LayerNorm", "cls.predictions.transform.LayerNorm")
    for i in range(LAYERS):
        layer = f"bert.encoder.layer.{i}"
        found |= same(*(f"{layer}.attention.self.{part}" for part in ("query", "key", "value")))
        found |= same(f"{layer}.attention.output.dense", f"{layer}.intermediate.dense", f"{layer}.output.dense")
        found |= norms(f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm")
    return found


def qwen3_moe_places() -> dict[str, list[str]]:
    found = llama_like(LAYERS, "self_attn.q_norm", "self_attn.k_norm", mlp=False)
    for i in range(LAYERS):
        mlp = f"model.layers.{i}.mlp"
        found |= same(f"{mlp}.gate")
        for e in range(EXPERTS):
            expert = f"{mlp}.experts.{e}"
            found[f"{mlp}.experts.gate_up_proj[{e}]"] = [f"{expert}.gate_proj.input", f"{expert}.up_proj.input"]
            found[f"{mlp}.experts.down_proj[{e}]"] = [f"{expert}.down_proj.input"]
    return found


def mixtral_places() -> dict[str, list[str]]:
    found = llama_like(LAYERS, mlp=False)
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        found[f"{layer}.mlp.gate.weight"] = [f"{layer}.block_sparse_moe.gate.input"]
        for e in range(EXPERTS):
            expert = f"{layer}.block_sparse_moe.experts.{e}"
            found[f"{layer}.mlp.experts.gate_up_proj[{e}]"] = [f"{expert}.w1.input", f"{expert}.w3.input"]
            found[f"{layer}.mlp.experts.down_proj[{e}]"] = [f"{expert}.w2.input"]
    return found


def attentions(layers: int, pattern: str = "model.layers.{}.self_attn") -> list[str]:
    return [pattern.format(i) for i in range(layers)]


GEMMA_NORMS = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
FAMILIES: dict[str, tuple[dict[str, list[str]], list[str], Any]] = {
    "qwen3": (llama_like(LAYERS, "self_attn.q_norm", "self_attn.k_norm"), attentions(LAYERS), watched_sdpa),
    "gpt_neox": (neox_places(), attentions(LAYERS, "gpt_neox.layers.{}.attention"), watched_sdpa),
    "bert": (bert_places(), attentions(LAYERS, "bert.encoder.layer.{}.attention.self"), watched_sdpa),
    "qwen3_moe": (qwen3_moe_places(), attentions(LAYERS), watched_sdpa),
    "mixtral": (mixtral_places(), attentions(LAYERS), watched_sdpa),
    "gemma2": (llama_like(LAYERS, *GEMMA_NORMS), attentions(LAYERS), watched_eager),
}


def load(folder: Path) -> Any:
    """The checkpoint, as transformers itself loads it."""
    architecture = transformers.AutoConfig.from_pretrained(folder).architectures[0]
    options = {"dtype": torch.bfloat16, "experts_implementation": "eager"}
    return getattr(transformers, architecture).from_pretrained(folder, **options).eval()


def batches_of(ids: list[list[int]], size: int, pad: int) -> Batches:
    """Calls of up to `size` prompts, padded on the right, with a mask if there is padding."""
    found: Batches = []
    for start in range(0, len(ids), size):
        rows = [torch.tensor(row) for row in ids[start : start + size]]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
        ones = [torch.ones(len(row), dtype=torch.int64) for row in rows]
        mask = torch.nn.utils.rnn.pad_sequence(ones, batch_first=True)
        call = {"input_ids": padded} if mask.all() else {"input_ids": padded, "attention_mask": mask}
        found.append(([len(row) for row in rows], call))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_statistic_equals_that_of_hooks_written_by_hand(family: str, batch_size: int, tmp_path: Path) -> None:
    folder = save_model(make_model(family), tmp_path / "model")
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    output = tmp_path / "calibration.safetensors"
    options = CalibrateOptions(output=output, prompts=str(prompts), batch_size=batch_size, stream_layers="off")
    verbs.calibrate(folder, options)

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer(text, truncation=True, max_length=64)["input_ids"] for text in TEXTS]
    assert {len(row) for row in ids} >= {1, 64}
    hand = run_by_hand(load(folder), batches_of(ids, batch_size, tokenizer.pad_token_id), *FAMILIES[family])
    hand.check(read_calibration(output), len(TEXTS))


@pytest.mark.slow
def test_the_demo_model_over_the_prompts_that_come_with_it(tmp_path: Path) -> None:
    rows = BUILT_IN.read_text(encoding="utf-8").splitlines()[:24]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(rows), encoding="utf-8")
    output = tmp_path / "calibration.safetensors"
    facts = calibrate(DEMO, output, prompts=str(prompts), num_prompts=24, max_length=64)
    assert facts.streamed is False

    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO)
    # how a conversation becomes text is not at stake here
    ids = [found for found, _ in tokenize(load_prompts([str(prompts)], 24), tokenizer, 64)]
    places = llama_like(4, "self_attn.q_norm", "self_attn.k_norm")
    hand = run_by_hand(load(DEMO), batches_of(ids, 1, 0), places, attentions(4), watched_sdpa)
    calibration = read_calibration(output)
    hand.check(calibration, 24)

    for kind in "kv":
        point = f"model.layers.1.self_attn.{kind}"
        values = torch.cat([part[0] for part in hand.seen[point]])
        heads = values.reshape(-1, 2, 64).abs().amax((0, 2))  # 2 KV heads of 64 channels
        assert calibration.by_point[point].group_amax(64).tolist() == heads.tolist()


def test_what_enters_several_linears_is_kept_once(tmp_path: Path) -> None:
    folder = save_model(make_model("qwen3"), tmp_path / "model")
    prompts = write_prompts(tmp_path / "prompts.jsonl", TEXTS[:2])
    calibrate(folder, tmp_path / "c.safetensors", prompts=str(prompts))
    calibration = read_calibration(tmp_path / "c.safetensors")
    layer = "model.layers.1"
    together = {f"{layer}.self_attn.{part}_proj.input" for part in "qkv"} | {f"{layer}.input_layernorm.output"}
    assert set(calibration.by_point[f"{layer}.self_attn.q_proj.input"].points) == together
    together = {f"{layer}.mlp.{part}_proj.input" for part in ("gate", "up")} | {
        f"{layer}.post_attention_layernorm.output"
    }
    assert set(calibration.by_point[f"{layer}.mlp.up_proj.input"].points) == together
    assert calibration.by_point[f"{layer}.self_attn.k"].channel_amax.size == KV_HEADS * HEAD_DIM
    assert calibration.by_point[f"{layer}.self_attn.o_proj.input"].channel_amax.size == HEADS * HEAD_DIM


def test_a_conversation_goes_through_the_chat_template_if_there_is_one(tmp_path: Path) -> None:
    model = make_model("qwen3")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]}\n')
    for template, text in ((True, "<|user|>Hi<|assistant|>Yes"), (False, "Hi\n\nYes")):
        folder = save_model(model, tmp_path / f"model-{template}", chat_template=template)
        output = tmp_path / f"{template}.safetensors"
        calibrate(folder, output, prompts=str(prompts))
        ids = transformers.AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
        hand = run_by_hand(load(folder), batches_of([ids], 1, 1), *FAMILIES["qwen3"])
        hand.check(read_calibration(output), 1)


def test_the_public_names_work_together(tmp_path: Path) -> None:
    """`fp8pack.calibrate` is the function, also after something else of its room was used."""
    folder = save_model(make_model("qwen3"), tmp_path / "model")
    prompts = write_prompts(tmp_path / "prompts.jsonl", TEXTS[:2])
    options = CalibrateOptions(output=tmp_path / "c.safetensors", prompts=str(prompts))
    assert verbs.calibrate(folder, options).output == tmp_path / "c.safetensors"
