"""The FP8 KV cache, simulated: K after rotary and V are rounded to E4M3 with the checkpoint's scales.

An engine writes them into its cache so, and reads them from it for every token, the newest included.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fp8pack.evaluation.models import Opened
from fp8pack.modelrun.transformers_internals import add_attention, attention_of, implementations, takes_attention
from fp8pack.numerics.formats import E4M3


@contextmanager
def simulating_kv_cache(opened: Opened) -> Iterator[tuple[str, ...]]:
    """Round K and V within this context; yields what is to be said of it."""
    if not opened.kv_scales:
        yield ()
        return
    model: Any = opened.model
    if not takes_attention(model):
        yield (f"the FP8 KV cache of {opened.path} is not simulated: its class computes attention by itself",)
        return
    paths = {module: path for path, module in model.named_modules()}
    before = implementations(model, "attn")
    with ExitStack() as undo:
        ours = {}
        for original in set(before.values()):
            base = original or "eager"
            ours[original] = f"fp8pack_kv_{base}_{id(opened):x}"
            add_attention(ours[original], base, _attention(base, opened, paths), undo)
        undo.callback(model.set_attn_implementation, before)
        model.set_attn_implementation({key: ours[original] for key, original in before.items()})
        yield (f"the FP8 KV cache of {opened.path} is simulated with its scales",)


def _attention(base: str, opened: Opened, paths: dict[nn.Module, str]) -> Any:
    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        place = opened.loader.names.of_place(paths[module])
        key, value = (
            states if (scale := opened.kv_scales.get(f"{place}.{kind}")) is None else round_states(states, scale)
            for kind, states in (("k", key), ("v", value))
        )
        return attention_of(module, base)(module, query, key, value, *args, **kwargs)

    return attention


def round_states(states: Tensor, scale: Tensor) -> Tensor:
    """Return K or V [B, H, S, D], rounded to E4M3 with one scale, or one for each head: RNE, saturated, dequantized."""
    spread = scale.float().to(states.device).reshape(1, -1, 1, 1)
    largest = torch.tensor(E4M3.max, device=states.device)
    payload = (states.float() / spread).clamp(-largest, largest).to(torch.float8_e4m3fn)
    return (payload.float() * spread).to(states.dtype)
