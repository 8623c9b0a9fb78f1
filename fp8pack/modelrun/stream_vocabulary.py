"""The input embedding and the head of a streamed model, in memory only in the rounds that use their values."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fp8pack.modelrun.stream_layers import Stack, why_no_stack
from fp8pack.numerics.replaced_forwards import replaced_forwards


class Vocabulary:
    """Loads and frees the two largest weights outside of the layers; both are freed when it is made.

    The embedding's values enter the first layer and no later round: there, zeros of its output's shape stand in for
    it. The head is used in the last round. An embedding that is used in another way stays in memory.
    """

    def __init__(self, model: PreTrainedModel, stack: Stack, load: Callable[[Iterable[str]], None]) -> None:
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[no-untyped-call]
        self._load, self._embedding, self._head = load, _Part(model, embedding), _Part(model, head)
        weight = getattr(embedding, "weight", None)  # some models embed by several modules
        self._is_tied = weight is not None and getattr(head, "weight", None) is weight
        self._has_stand_in = _can_stand_in(model, stack, embedding)
        self._embedding.free()
        self._head.free()

    @contextmanager
    def in_memory(self, *, embedding: bool, head: bool) -> Iterator[None]:
        """Have what a round needs in memory, and nothing else, within this context."""
        embedding = embedding or not self._has_stand_in or (self._is_tied and head)
        head = head or (self._is_tied and embedding)
        parts = ((self._embedding, embedding), (self._head, head))
        for part, is_needed in parts:
            if not is_needed:
                part.free()
        if missing := [name for part, is_needed in parts if is_needed for name in part.missing]:
            self._load(missing)
        with replaced_forwards([] if embedding else [(self._embedding.module, _stand_in(self._embedding.module))]):
            yield


class _Part:
    """A module of the model, and the names of its parameters; an empty one if the model has none."""

    def __init__(self, model: nn.Module, module: nn.Module | None) -> None:
        self._model = model
        self.module = nn.Module() if module is None else module
        paths = [path for path, found in model.named_modules(remove_duplicate=False) if found is module]
        self._names = [name for name in model.state_dict() if name.rpartition(".")[0] in paths]

    @property
    def missing(self) -> list[str]:
        """The parameters that are not in memory."""
        return [name for name in self._names if self._model.state_dict(keep_vars=True)[name].is_meta]

    def free(self) -> None:
        for name, parameter in list(self.module.named_parameters(recurse=False)):  # buffers are not loaded again
            setattr(self.module, name, nn.Parameter(parameter.to("meta"), requires_grad=False))


def _can_stand_in(model: nn.Module, stack: Stack, embedding: nn.Module) -> bool:
    """Whether the embedding's values reach nothing but the first layer's hidden states."""
    if not isinstance(embedding, nn.Embedding):
        return False
    ids = torch.ones((1, 4), dtype=torch.long, device=embedding.weight.device)
    with replaced_forwards([(embedding, _stand_in(embedding, math.nan))]):
        return not why_no_stack(stack, lambda: model(input_ids=ids))


def _stand_in(embedding: Any, value: float = 0.0) -> Callable[[Tensor], Tensor]:
    """A forward that returns one value in place of every embedding."""
    dtype, size = embedding.weight.dtype, embedding.embedding_dim
    return lambda ids: torch.full((*ids.shape, size), value, dtype=dtype, device=ids.device)
