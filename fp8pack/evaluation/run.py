"""How a model is run over the text: whole in memory, or one decoder layer at a time."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Protocol

from torch import Tensor

from fp8pack.checkpoint.shard_writer import check_space, sync_file, write_file
from fp8pack.evaluation.models import Opened
from fp8pack.evaluation.text import Window
from fp8pack.modelrun.stream_layers import Rounds, Stack, return_memory_at_once
from fp8pack.modelrun.stream_vocabulary import Vocabulary

Tick = Callable[[int], None]
Predict = Callable[[Tensor], Tensor]  # tokens [T] to logits [T - 1, V]


class Run(Protocol):
    """A model on its way through the text: first `prepare`, then logits of each window, in order."""

    opened: Opened

    @property
    def stages(self) -> int:
        """How often each token is counted."""
        ...

    def prepare(self, windows: Sequence[Window], tick: Tick) -> None:
        """Do all that comes before the logits."""
        ...

    def predicting(self) -> AbstractContextManager[Predict]:
        """Yield a function that returns the logits of a window; called with the windows in order."""
        ...


class Resident:
    """A model with all its weights in memory."""

    stages = 1

    def __init__(self, opened: Opened) -> None:
        self.opened = opened

    def prepare(self, windows: Sequence[Window], tick: Tick) -> None:
        """Load the model."""
        self.opened.load(list(self.opened.model.state_dict()))

    @contextmanager
    def predicting(self) -> Iterator[Predict]:
        """Yield the model's logits."""
        yield self.opened.logits


class Streamed:
    """A model with one decoder layer in memory; the folder keeps hidden states, so that a run can be continued.

    What lies outside of its layers is loaded; the input embedding and the head are freed until a round uses them.
    """

    def __init__(self, opened: Opened, stack: Stack, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.opened, self.stack, self._folder = opened, stack, folder
        self.rounds = Rounds(stack, folder)
        self._vocabulary = Vocabulary(opened.model, stack, opened.load)
        self._parameters = list(opened.model.state_dict())

    @property
    def stages(self) -> int:
        """The layers, and the logits."""
        return len(self.stack.layers) + 1

    @property
    def last_hidden_path(self) -> Path:
        """The file of the hidden states after the last layer, there once the run is prepared."""
        return self.rounds.hidden_path(len(self.stack.layers))

    def prepare(self, windows: Sequence[Window], tick: Tick) -> None:
        """Run all layers, from the first that is not done."""
        tokens = sum(len(window.ids) for window in windows)
        check_space(self._folder, 2 * tokens * self.opened.loader.hidden_nbytes)
        first = self._done()
        tick(first * tokens)
        for index in range(first, len(self.stack.layers)):
            with self.layer(index):
                self.run_layer(index, windows, tick)
            self.finish(index + 1)
            self.rounds.hidden_path(index).unlink(missing_ok=True)

    def run_layer(self, index: int, windows: Sequence[Window], tick: Tick) -> None:
        """Run the windows through one layer, which is in memory."""
        with self.rounds.round(index) as take:
            for window in windows:
                take(partial(self.opened.outputs, window.ids))
                tick(len(window.ids))

    @contextmanager
    def layer(self, index: int) -> Iterator[None]:
        """Have a layer in memory within this context, and before the first the embedding."""
        inside = f"{self.stack.path}.{index}."
        self.opened.load(name for name in self._parameters if name.startswith(inside))
        with self._vocabulary.in_memory(embedding=index == 0, head=False):
            self.opened.release()
            yield
        self.stack.layers[index].to("meta")
        self.opened.release()
        return_memory_at_once()

    def finish(self, done: int) -> None:
        """Record that so many layers are done, once their hidden states are on the disk."""
        sync_file(self.rounds.hidden_path(done))
        write_file(self._folder / f"done-{done:05}", b"")

    @contextmanager
    def predicting(self) -> Iterator[Predict]:
        """Yield logits from the hidden states after the last layer."""
        with self.predicting_from([self.last_hidden_path]) as predict:
            yield predict

    @contextmanager
    def predicting_from(self, paths: Sequence[Path]) -> Iterator[Predict]:
        """Yield logits from hidden states after the last layer, of several runs that take turns."""
        with (
            self._vocabulary.in_memory(embedding=False, head=True),
            self.rounds.round(len(self.stack.layers), taking_turns=paths) as take,
        ):

            def predict(ids: Tensor) -> Tensor:
                found: list[Tensor] = []
                take(lambda: found.append(self.opened.logits(ids)))
                return found[0]

            yield predict

    def shape(self, tokens: int) -> tuple[int, int]:
        """Return the shape [T, H] of hidden states of so many tokens."""
        return tokens, self.opened.loader.hidden_nbytes // 4

    def skip_layers(self) -> None:
        """Take all layers for done: the file of the last hidden states is written."""
        self.finish(len(self.stack.layers))

    def _done(self) -> int:
        return max((int(path.name.removeprefix("done-")) for path in self._folder.glob("done-*")), default=0)
