"""Checkpoints that a sharded training run saved without gathering its parameters."""

import re
from collections.abc import Iterable

from fp8pack.modelfacts.model import ModelFacts
from fp8pack.modelfacts.spec import TensorSpec

_WEIGHT = re.compile(r"(embed_tokens|wte|word_embeddings|lm_head|norm|_proj)\.weight$")
_NORM = re.compile(  # of the language model, whose width config.json has
    r"((model|language_model|transformer|text_model|thinker)\.)*"
    r"(layers\.\d+\.(input|post_attention)_layernorm|norm)\.weight$"
)


def ungathered(specs: Iterable[TensorSpec], facts: ModelFacts) -> str:
    """Return why a checkpoint is a part of one, as text: an empty weight, or a norm of a part of the hidden size."""
    for spec in specs:
        if 0 in spec.shape and _WEIGHT.search(spec.name):
            return f"{spec.name} has shape {list(spec.shape)}"
        size, hidden = (spec.shape[0] if len(spec.shape) == 1 else 0), facts.hidden_size
        if _NORM.match(spec.name) and 0 < size < hidden and hidden % size == 0:
            return f"{spec.name} has shape [{size}], and config.json a hidden size of {hidden}"
    return ""
