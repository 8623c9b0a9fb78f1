"""Interception of activations that module hooks do not see in a transformers model: experts, K after rotary, and V.

transformers looks up how to run experts and attention in two registries (`ExpertsInterface`, `AttentionInterface`).
While a model is observed it uses our functions, which record the activations and then compute the same as the model's
own: experts one at a time as in its eager implementation, attention with sdpa if the model used it, else with its eager
function. Another kernel, such as FlashAttention, is replaced by sdpa if the model supports it.
"""

import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fp8pack.calibration.recorder import Rows
from fp8pack.modelrun.names import Names
from fp8pack.modelrun.transformers_internals import (
    activate_expert,
    add_attention,
    add_experts,
    attention_of,
    implementations,
    is_experts,
    norm_expert,
    supports_sdpa,
    takes_attention,
)


class Recording(Protocol):
    """The part of an observation that interception needs."""

    @property
    def rows(self) -> Rows:
        """The prompt of each row of the running call."""
        ...

    @property
    def past(self) -> int | None:
        """Tokens in the KV cache of the running call, None without a cache."""
        ...

    def wants(self, path: str) -> bool:
        """Whether the module with this path in memory is observed."""
        ...

    @property
    def wants_all_experts(self) -> bool:
        """Whether every token is also run through every expert."""
        ...

    def record(self, points: Sequence[str], value: Tensor, heads: int) -> None:
        """Add a tensor [B, T, K] whose channels belong to this many heads."""
        ...

    def expect(self, points: Sequence[str], channels: int) -> None:
        """Create a site of these points, even if nothing is recorded."""
        ...

    def record_rows(self, points: Sequence[str], value: Tensor, rows: Rows, *, routed: bool) -> None:
        """Add a tensor [R, K] of these rows."""
        ...


def intercept(model: Any, recording: Recording, names: Names, paths: dict[nn.Module, str], undo: ExitStack) -> None:
    """Record attention and experts of a transformers model until `undo` is closed.

    paths: of every module, as in `names`.
    """
    before = implementations(model, "attn")
    ours: dict[str, str] = {}
    for original in set(before.values()):
        base = _base(model, original)
        ours[original] = f"fp8pack_{base}_{id(recording):x}"
        add_attention(ours[original], base, _attention(base, recording, names, paths), undo)
    if takes_attention(model):
        undo.callback(model.set_attn_implementation, before)
        model.set_attn_implementation({key: ours[original] for key, original in before.items()})
    if any(is_experts(module) for module in model.modules()):
        experts_before = implementations(model, "experts")
        name = f"fp8pack_{id(recording):x}"
        add_experts(name, _experts(recording, names, paths), undo)
        undo.callback(model.set_experts_implementation, experts_before)
        model.set_experts_implementation(dict.fromkeys(experts_before, name))


def _base(model: Any, original: str | None) -> str:
    """The attention implementation to compute with; every model has eager, with its own additions."""
    if original in ("sdpa", "eager", None):
        return original or "eager"
    if supports_sdpa(model):
        return "sdpa"
    warnings.warn(
        f"{type(model).__name__} does not support sdpa to replace {original}: eager attention is used while observed",
        UserWarning,
        stacklevel=2,
    )
    return "eager"


def _attention(
    base: str, recording: Recording, names: Names, paths: dict[nn.Module, str]
) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        place = names.of_place(paths[module])
        observed = (("k", key), ("v", value)) if recording.wants(paths[module]) else ()
        for kind, states in observed:  # [B, heads, S, D]; with a cache the new tokens come last
            first, length = recording.past, query.shape[2]
            new = states if first is None else states[:, :, min(first, states.shape[2] - length) :][:, :, :length]
            recording.record([f"{place}.{kind}"], new.transpose(1, 2).flatten(2), heads=new.shape[1])
        result: tuple[Tensor, Tensor | None] = attention_of(module, base)(module, query, key, value, *args, **kwargs)
        return result

    return attention


def _experts(recording: Recording, names: Names, paths: dict[nn.Module, str]) -> Callable[..., Tensor]:
    @cache
    def points(module: Any) -> tuple[list[list[str]], list[list[str]]]:
        """The points of each expert: its input, and the input of its down projection."""

        def inputs(parameter: str) -> list[list[str]]:
            modules = names.of_experts(f"{paths[module]}.{parameter}", module.num_experts)
            return [[f"{name}.input" for name in found] for found in modules]

        sides = inputs(_up_name(module)), inputs("down_proj")
        if recording.wants(paths[module]):
            for name, found in zip((_up_name(module), "down_proj"), sides, strict=True):
                for each in found:  # also for experts without any token
                    recording.expect(each, getattr(module, name).shape[-2 if module.is_transposed else -1])
        return sides

    def experts(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        up, down = points(module)
        result = torch.zeros_like(hidden_states)
        mask = nn.functional.one_hot(top_k_index, num_classes=module.num_experts + 1).permute(2, 1, 0)
        for expert in range(module.num_experts):
            slots, tokens = torch.where(mask[expert])
            if tokens.numel() == 0:
                continue
            inputs_of_expert = hidden_states[tokens]
            inner = _up(module, inputs_of_expert, expert)
            if recording.wants(paths[module]):
                rows = recording.rows.take(tokens.cpu().numpy())
                recording.record_rows(up[expert], inputs_of_expert, rows, routed=True)
                recording.record_rows(down[expert], inner, rows, routed=True)
            weighted = _down(module, inner, expert) * top_k_weights[tokens, slots, None]
            result.index_add_(0, tokens, weighted.to(result.dtype))
        if recording.wants_all_experts and recording.wants(paths[module]):
            recording.record_rows(
                [point for found in up for point in found], hidden_states, recording.rows, routed=False
            )
            for expert in range(module.num_experts):
                inner = _up(module, hidden_states, expert)
                recording.record_rows(down[expert], inner, recording.rows, routed=False)
        return result

    return experts


def _up_name(module: Any) -> str:
    return "gate_up_proj" if module.has_gate else "up_proj"


def _up(module: Any, value: Tensor, expert: int) -> Tensor:
    return activate_expert(module, _linear(module, _up_name(module), value, expert))


def _down(module: Any, value: Tensor, expert: int) -> Tensor:
    return norm_expert(module, _linear(module, "down_proj", value, expert))


def _linear(module: Any, name: str, value: Tensor, expert: int) -> Tensor:
    weight = getattr(module, name)[expert]
    out = nn.functional.linear(value, weight.T if module.is_transposed else weight)
    return out + getattr(module, f"{name}_bias")[expert] if module.has_bias else out
