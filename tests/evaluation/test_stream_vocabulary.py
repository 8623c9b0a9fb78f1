"""The embedding and the head are in memory only in the rounds that use them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from calibration.tiny_models import make_model, save_model
from torch import Tensor, nn

import fp8pack
from fp8pack.evaluation.models import Opened, open_source
from fp8pack.evaluation.run import Streamed
from fp8pack.modelrun.stream_layers import Stack, open_stack
from fp8pack.modelrun.stream_vocabulary import Vocabulary

CPU = torch.device("cpu")


def open_streamed(model: Path, folder: Path) -> Streamed:
    """Return the streamed run of a source."""
    opened: Opened = open_source(model, torch.float32, CPU, trust_remote_code=False)
    stack = open_stack(opened.model, opened.load, CPU)
    assert isinstance(stack, Stack)
    return Streamed(opened, stack, folder)


def in_memory(model: nn.Module) -> set[str]:
    """Return which of embedding and head are no tensors without values."""
    modules = {"embedding": model.get_input_embeddings(), "head": model.get_output_embeddings()}  # type: ignore[operator]
    return {name for name, module in modules.items() if not module.weight.is_meta}


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_only_the_first_round_has_the_embedding_and_only_the_last_the_head(tmp_path: Path, family: str) -> None:
    run = open_streamed(save_model(make_model(family), tmp_path / "model"), tmp_path / "run")
    model, both = run.opened.model, {"embedding", "head"}
    is_tied = family == "gemma3"
    assert in_memory(model) == set()
    with run.layer(0):
        assert in_memory(model) == (both if is_tied else {"embedding"})
    with run.layer(1):
        assert in_memory(model) == set()
    run.last_hidden_path.touch()
    with run.predicting():
        assert in_memory(model) == (both if is_tied else {"head"})


@pytest.mark.parametrize("family", ["qwen3", "gpt_neox", "bert", "mixtral", "gemma2", "gemma3", "llava"])
def test_streamed_equals_resident_for_every_family(tmp_path: Path, family: str) -> None:
    model, packed, text = save_model(make_model(family), tmp_path / "model"), tmp_path / "packed", tmp_path / "t.txt"
    fp8pack.pack(model, packed, scheme="FP8_DYNAMIC")
    text.write_text("a text of some words\n\nanother one\n")
    found = [
        fp8pack.evaluate(packed, model, text=str(text), device="cpu", stream_layers=how).checkpoints
        for how in ("on", "off")
    ]
    assert found[0] == found[1]


class Toy(nn.Module):
    """A model of two layers, whose embeddings are used as `use` says."""

    def __init__(self, use: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(8, 4), nn.Linear(4, 8)
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self._use = use

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return logits."""
        embedded = self.embedding(input_ids)
        hidden = embedded
        for layer in self.layers:
            hidden = layer(hidden)
        result: Tensor = self.head(self._use(hidden, embedded))
        return result

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding."""
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        """Return the head."""
        return self.head


@pytest.mark.parametrize("stays", [False, True])
def test_an_embedding_that_is_used_after_the_layers_stays_in_memory(stays: bool) -> None:
    model = Toy(lambda hidden, embedded: hidden + embedded if stays else hidden)
    weight = model.embedding.weight.detach().clone()

    def load(names: object) -> None:
        model.embedding.weight = nn.Parameter(weight)

    stack = Stack("layers", tuple(model.layers), returns_tuple=False)
    with Vocabulary(model, stack, load).in_memory(embedding=False, head=False):  # type: ignore[arg-type]
        assert in_memory(model) == ({"embedding"} if stays else set())
