"""`compare_models`: any two modules of torch on the same batches, module by module."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fp8pack.errors import InputError
from fp8pack.evaluation.model_comparison import ModelComparison, ModuleComparison
from fp8pack.modelfacts.patterns import Matcher, Patterns, parse_patterns
from fp8pack.numerics.metrics import sqnr_db

Call = Callable[[nn.Module, Any], object]


def compare_models(
    a: nn.Module, b: nn.Module, batches: Iterable[Any], *, call: Call | None = None, only: Patterns = ()
) -> ModelComparison:
    """Run two models on the same batches and compare the outputs of each module that both have, by name.

    a: the reference; b: the same model with quantized weights, say. batches: tensors, tuples of arguments, or
        dictionaries of keywords; `call(model, batch)` runs a batch in another way, as a diffusion pipeline does.
        Both must draw the same random numbers: the generators of torch are put back before B runs.
    only: patterns that name modules; by default all of them. An error of an earlier module is in all that follow.
    Copies of A's outputs on one batch are kept in memory, on their device.

    Raises:
        InputError: no module of the two is called with outputs of the same shape. RecipeError: a pattern matches none.
    """
    matcher = Matcher(patterns, "only") if (patterns := parse_patterns("only", only)) else None
    others = dict(b.named_modules())
    names = [name for name, _ in a.named_modules() if name in others and (matcher is None or matcher.find(name))]
    if matcher is not None:
        matcher.check()
    tallies: dict[str, _Tally] = {}
    count = 0
    run = call or _call
    with torch.no_grad():
        for batch in batches:
            count += 1
            kept: dict[str, list[Tensor]] = {}
            states = torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
            with _recording(a, names, lambda name, out, kept=kept: kept.setdefault(name, []).append(out.clone())):  # type: ignore[misc]
                run(a, batch)
            torch.set_rng_state(states[0])
            torch.cuda.set_rng_state_all(states[1])
            with _recording(b, names, lambda name, out, kept=kept: _compare(tallies, kept, name, out)):  # type: ignore[misc]
                run(b, batch)
    if not tallies:
        raise InputError("no module of the two models is called with outputs of the same shape")
    kinds = {name: type(module).__name__ for name, module in a.named_modules()}
    return ModelComparison(count, tuple(tally.result(name, kinds[name]) for name, tally in tallies.items()))


@dataclass(slots=True)
class _Tally:
    """The energies of A's outputs, of B's and of their difference."""

    calls: int = 0
    signal: float = 0.0
    energy: float = 0.0
    noise: float = 0.0

    def result(self, name: str, kind: str) -> ModuleComparison:
        if not math.isfinite(self.signal + self.energy + self.noise):
            return ModuleComparison(name, kind, self.calls, None, None)
        norms = math.sqrt(self.signal * self.energy)
        cosine = (self.signal + self.energy - self.noise) / 2 / norms if norms else None
        return ModuleComparison(name, kind, self.calls, sqnr_db(self.signal, self.noise), cosine)


def _call(model: nn.Module, batch: Any) -> object:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


@contextmanager
def _recording(model: nn.Module, names: Iterable[str], record: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call `record` with the first tensor of every output within this context."""
    modules = dict(model.named_modules())

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def observe(module: nn.Module, inputs: Any, output: Any) -> None:
            if (found := _tensor_of(output)) is not None:
                record(name, found)

        return observe

    handles = [modules[name].register_forward_hook(hook(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensor_of(output: Any) -> Tensor | None:
    """The first tensor of floats in an output."""
    if isinstance(output, Tensor):
        return output.detach() if output.is_floating_point() else None
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    return next((found for part in parts if (found := _tensor_of(part)) is not None), None)


def _compare(tallies: dict[str, _Tally], kept: dict[str, list[Tensor]], name: str, output: Tensor) -> None:
    """Compare an output of B with A's of the same call."""
    if not kept.get(name):
        return
    exact = kept[name].pop(0)
    if exact.shape != output.shape:
        return
    x, y = exact.double(), output.to(exact.device).double()
    tally = tallies.setdefault(name, _Tally())
    tally.calls += 1
    tally.signal += float(x.square().sum())
    tally.energy += float(y.square().sum())
    tally.noise += float((x - y).square().sum())
