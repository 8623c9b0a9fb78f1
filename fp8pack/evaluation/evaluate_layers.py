"""`evaluate_layers`: what each layer or linear costs, by quantizing one at a time.

All runs go through the layers together. In round j, layer j of the source and of the checkpoint are in memory: the
source's hidden states pass through the one, and a new run begins with the other; the runs that began before pass
through the source's. So L layers take (L + 1) / 2 forward passes for the runs, one for the source, and a part of one
for the outputs of linears.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor, nn

from fp8pack.checkpoint.shard_writer import check_space, sync_file, write_file, writing
from fp8pack.errors import InputError
from fp8pack.evaluation.base_file import base_facts
from fp8pack.evaluation.divergence import Positions, compare_logits
from fp8pack.evaluation.intervals import Bootstrap
from fp8pack.evaluation.kv_cache import simulating_kv_cache
from fp8pack.evaluation.layer_evaluation import LayerEvaluation, LinearCost, PartCost
from fp8pack.evaluation.models import Opened, open_packed, open_source
from fp8pack.evaluation.options import LAYER_TOKENS, EvalOptions
from fp8pack.evaluation.progress import OnProgress, Progress
from fp8pack.evaluation.run import Streamed
from fp8pack.evaluation.text import Text, Window, read_text
from fp8pack.evaluation.working_folder import working_folder
from fp8pack.gemm.device import choose_device
from fp8pack.inputs import Duration, Texts, parse_choice, parse_path
from fp8pack.modelfacts.spec import TORCH_NAMES
from fp8pack.modelrun.loader import quiet_transformers, read_tokenizer
from fp8pack.modelrun.prompts import HELD_OUT
from fp8pack.modelrun.stream_layers import Rounds, open_stack, return_memory_at_once
from fp8pack.numerics.metrics import sqnr_db
from fp8pack.numerics.replaced_forwards import replaced_forwards
from fp8pack.numerics.torch_dtypes import TORCH_DTYPES
from fp8pack.runtime.experts import FP8Experts
from fp8pack.runtime.linear import FP8Linear

BY = ("layer", "linear")
_LINEAR_TOKENS = 1024  # enough for the output of a linear


def evaluate_layers(  # noqa: PLR0913
    checkpoint: str | Path,
    against: str | Path,
    *,
    by: str = "layer",
    text: Texts = HELD_OUT,
    text_column: str | None = None,
    num_tokens: int | None = None,
    max_length: int | None = None,
    activations: str = "declared",
    dtype: str = "float32",
    device: str = "auto",
    trust_remote_code: bool = False,
    state: str | Path | None = None,
    deadline: Duration | None = None,
    on_progress: OnProgress | None = None,
) -> LayerEvaluation:
    """Quantize one decoder layer, or one linear, at a time, and measure what each costs the model.

    by: layer or linear; the experts of a layer count as one linear. num_tokens: 4,096 by default. The other arguments
        are those of `evaluate`. Two layers are in memory at a time.

    Raises:
        InputError: a checkpoint or a text is refused, or its layers cannot be run one at a time.
        RecipeError: an option is out of range. VerificationError: a logit is a NaN or infinity.
        DeadlineError: the deadline was reached. OutputError: another process uses the state.
        SpaceError: no space left, or not writable. DeviceError: torch finds no such device.
    """
    options = EvalOptions(
        text=text,
        text_column=text_column,
        num_tokens=LAYER_TOKENS if num_tokens is None else num_tokens,
        max_length=max_length,
        activations=activations,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        state=state,
        deadline=deadline,
    )
    kind = parse_choice("by", by, BY)
    return run_layers(parse_path("checkpoint", checkpoint), parse_path("against", against), kind, options, on_progress)


def run_layers(
    checkpoint: Path, against: Path, by: str, options: EvalOptions, on_progress: OnProgress | None = None
) -> LayerEvaluation:
    """Return what `evaluate_layers` does."""
    with quiet_transformers(), torch.no_grad():
        return _evaluate(checkpoint, against, by, options, on_progress or (lambda done, total: None))


@dataclass(slots=True)
class _Tally:
    """The energies of a linear's outputs in the source, and of what FP8 adds to them."""

    signal: float = 0.0
    noise: float = 0.0

    def add(self, exact: Tensor, found: Tensor) -> None:
        x = exact.double()
        self.signal += float(x.square().sum())
        self.noise += float((x - found.double()).square().sum())

    @property
    def sqnr(self) -> float | None:
        return sqnr_db(self.signal, self.noise) if math.isfinite(self.signal + self.noise) else None


@dataclass(slots=True)
class _State:
    """What is done: layers, the parts in FP8 by name, and what was measured of linears; kept in a file."""

    path: Path
    done: int = 0
    parts: list[str] = field(default_factory=list)
    linears: dict[str, _Tally] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "_State":
        if not path.exists():
            return cls(path)
        data = json.loads(path.read_text())
        return cls(path, data["done"], data["parts"], {name: _Tally(*pair) for name, pair in data["linears"].items()})

    def write(self) -> None:
        linears = {name: (tally.signal, tally.noise) for name, tally in self.linears.items()}
        data = {"done": self.done, "parts": self.parts, "linears": linears}
        temporary = self.path.with_suffix(".partial")
        write_file(temporary, json.dumps(data).encode())
        with writing(self.path):
            temporary.replace(self.path)


class _Layers:
    """The runs of a source and of its copies with one part in FP8."""

    def __init__(self, source: Streamed, packed: Streamed, by: str, folder: Path, given: Text) -> None:
        self._source, self._packed, self._by, self._folder = source, packed, by, folder
        self._windows = given.windows
        self.state = _State.read(folder / "layers.json")
        self.names = [f"{source.stack.path}.{i}" for i in range(len(source.stack.layers))]
        self._fp8 = _fp8_modules(packed.opened.model, source.opened.model)
        self.num_linear_tokens = sum(len(window.ids) for window in self._for_linears())

    def parts_of(self, index: int) -> list[str]:
        """The parts of a layer that are in FP8 in a run of their own."""
        if self._by == "layer":
            return [self.names[index]]
        return [name for name in self._fp8 if name.startswith(f"{self.names[index]}.")]

    def weights_of(self, part: str) -> tuple[tuple[str, ...], int]:
        """The weights of a part that are in FP8, by their names in the checkpoint, and their elements."""
        modules = [
            each for each in self._packed.opened.model.get_submodule(part).modules() if isinstance(each, FP8Linear)
        ]
        return tuple(each.name for each in modules), sum(each.in_features * each.out_features for each in modules)

    @property
    def num_passes(self) -> int:
        """How often the text passes through a layer, or through the head, in all."""
        parts = [len(self.parts_of(i)) for i in range(len(self.names))]
        running = sum(count * (len(parts) - i) for i, count in enumerate(parts))
        return running + len(parts) + 1 + sum(parts)

    def run(self, tick: Callable[[int], None]) -> None:
        """Take all runs through all layers, from the first that is not done."""
        tokens = sum(len(window.ids) for window in self._windows)
        count = 1 + sum(len(self.parts_of(i)) for i in range(len(self.names)))
        check_space(self._folder, (count + 2) * tokens * self._source.opened.loader.hidden_nbytes)
        for index in range(len(self.names)):
            parts = self.parts_of(index)
            if index < self.state.done:
                tick(tokens * (1 + sum(len(self.parts_of(i)) for i in range(index + 1))))
                continue
            with self._source.layer(index), self._packed.layer(index):
                with self._measuring(index) as begin:
                    self._pass(self._source.opened, self._source.rounds, index, tick, begin)
                for name in self.state.parts:
                    self._pass(self._source.opened, self._rounds(name), index, tick)
                for name in parts:
                    self._begin(name, index, tick)
            self._finish(index, parts)

    def _begin(self, name: str, index: int, tick: Callable[[int], None]) -> None:
        """Start a run whose only FP8 part is in this layer."""
        folder = self._folder_of(name)
        with writing(folder):
            folder.mkdir(exist_ok=True)
            hidden = folder / self._source.rounds.hidden_path(index).name
            hidden.unlink(missing_ok=True)
            if index:
                os.link(self._source.rounds.hidden_path(index), hidden)
        if self._by == "layer":
            self._pass(self._packed.opened, Rounds(self._packed.stack, folder), index, tick)
            return
        module = self._source.opened.model.get_submodule(name)
        with replaced_forwards([(module, self._fp8[name].forward)]):
            self._pass(self._source.opened, self._rounds(name), index, tick)

    def _pass(
        self,
        opened: Opened,
        rounds: Rounds,
        index: int,
        tick: Callable[[int], None],
        begin: Callable[[Window], None] = lambda window: None,
    ) -> None:
        with rounds.round(index) as take:
            for window in self._windows:
                begin(window)
                take(partial(opened.outputs, window.ids))
                tick(len(window.ids))

    @contextmanager
    def _measuring(self, index: int) -> Iterator[Callable[[Window], None]]:
        """Compare the outputs of the source's linears with those in FP8; yields what says which window begins."""
        wanted = {id(window) for window in self._for_linears()}
        listening = True
        inside = f"{self.names[index]}."
        linears = {name: module for name, module in self._fp8.items() if isinstance(module, FP8Linear)}
        tallies = {name: _Tally() for name in linears if name.startswith(inside)}

        def begin(window: Window) -> None:
            nonlocal listening
            listening = id(window) in wanted

        def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
            def observe(module: nn.Module, inputs: Any, output: Any) -> None:
                if listening:
                    tallies[name].add(output, linears[name](inputs[0]))

            return observe

        model = self._source.opened.model
        handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in tallies]
        try:
            yield begin
        finally:
            for handle in handles:
                handle.remove()
        self.state.linears |= {name: tally for name, tally in tallies.items() if tally.signal}

    def _for_linears(self) -> list[Window]:
        """The first windows, up to a number of tokens, at least one."""
        found: list[Window] = []
        for window in self._windows:
            if found and sum(len(other.ids) for other in found) + len(window.ids) > _LINEAR_TOKENS:
                break
            found.append(window)
        return found

    def _finish(self, index: int, parts: Sequence[str]) -> None:
        """Record that a layer is done, once all hidden states are on the disk."""
        everyone = [self._source.rounds, *map(self._rounds, [*self.state.parts, *parts])]
        for rounds in everyone:
            sync_file(rounds.hidden_path(index + 1))
        self.state.parts += parts
        self.state.done = index + 1
        self.state.write()
        for rounds in everyone:
            rounds.hidden_path(index).unlink(missing_ok=True)

    def compare(self, tick: Callable[[int], None]) -> dict[str, list[Positions]]:
        """Compare the logits of every run with the source's, window by window."""
        last = len(self.names)
        paths = [self._source.last_hidden_path, *(self._rounds(name).hidden_path(last) for name in self.state.parts)]
        measured: dict[str, list[Positions]] = {name: [] for name in self.state.parts}
        with self._source.predicting_from(paths) as predict:
            for window in self._windows:
                reference = predict(window.ids)
                for name in self.state.parts:
                    measured[name].append(compare_logits(reference, predict(window.ids), window.ids[1:]))
                tick(len(window.ids) * len(paths))
        return measured

    def _rounds(self, name: str) -> Rounds:
        return Rounds(self._source.stack, self._folder_of(name))

    def _folder_of(self, name: str) -> Path:
        return self._folder / f"part-{name}"


def _fp8_modules(packed: nn.Module, source: nn.Module) -> dict[str, nn.Module]:
    """FP8 linears that are linears in the source's model, and the modules of experts that have FP8 ones, by path."""
    found: dict[str, nn.Module] = {}
    for path, _ in source.named_modules():
        try:
            other = packed.get_submodule(path)
        except AttributeError:
            continue  # the inside of a module that was replaced
        has_experts = any(isinstance(child, FP8Experts) for child in other.children())
        if isinstance(other, FP8Linear) or has_experts:
            found[path] = other
    return found


def _evaluate(
    checkpoint: Path, against: Path, by: str, options: EvalOptions, on_progress: OnProgress
) -> LayerEvaluation:
    started, device = time.monotonic(), choose_device(options.device)
    dtype, trust = TORCH_DTYPES[TORCH_NAMES[options.dtype]], options.trust_remote_code
    return_memory_at_once()
    base = open_source(against, dtype, device, trust_remote_code=trust)
    base.check_predicts()
    tokenizer = read_tokenizer(base.source, trust_remote_code=trust)
    length = base.loader.length(options.max_length)
    given = read_text(options, tokenizer, length, device)
    for window in given.windows:
        base.loader.check_tokens({given.names[window.document]: window.ids.tolist()})
    packed = open_packed(checkpoint, dtype, device, options.activations, trust_remote_code=trust)
    facts = [base_facts(base.source.fingerprint, given.windows, options.dtype), packed.source.fingerprint]
    key = blake3(json.dumps([*facts, by, options.activations, options.device]).encode()).hexdigest()
    with ExitStack() as stack:
        notes = [*given.notes, *packed.notes, *stack.enter_context(simulating_kv_cache(packed))]
        folder = stack.enter_context(working_folder(options.state, key))
        source, other = _streamed(base, device, folder / "source"), _streamed(packed, device, folder / "packed")
        layers = _Layers(source, other, by, folder, given)
        deadline = None if options.deadline is None else started + options.deadline
        progress = Progress(given.num_tokens * layers.num_passes, deadline, on_progress)
        layers.run(progress.tick)
        measured = layers.compare(progress.tick)
    if not measured:
        raise InputError(f"{checkpoint} has no FP8 linear in its layers", "choose an FP8 checkpoint")
    bootstrap = Bootstrap(given.lengths)
    joined = {name: Positions.joined(parts) for name, parts in measured.items()}
    return LayerEvaluation(
        source=against,
        checkpoint=checkpoint,
        activations=packed.activations,
        text=options.text,
        num_documents=len(given.names),
        num_tokens=sum(given.lengths),
        num_linear_tokens=layers.num_linear_tokens,
        dtype=options.dtype,
        by=by,
        perplexity=bootstrap.mean(next(iter(joined.values())).base_loss, np.exp),
        parts=tuple(
            PartCost(name, bootstrap.mean(found.kl), bootstrap.mean(found.top1), *layers.weights_of(name))
            for name, found in joined.items()
        ),
        linears=tuple(LinearCost(name, tally.sqnr) for name, tally in layers.state.linears.items()),
        notes=tuple(notes),
        seconds=time.monotonic() - started,
        fingerprint=base.source.fingerprint,
    )


def _streamed(opened: Opened, device: torch.device, folder: Path) -> Streamed:
    stack = open_stack(opened.model, opened.load, device)
    if isinstance(stack, str):
        raise InputError(f"{opened.path}: {stack}, so its layers cannot be run one at a time")
    return Streamed(opened, stack, folder)
