"""Which weights stay as they are, for a budget: by what each costs the model in FP8 and in bytes."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fp8pack.errors import RecipeError
from fp8pack.inputs import parse_count, parse_size
from fp8pack.modelfacts.fused import together
from fp8pack.planning.plan import TensorPlan

BUDGETS = "kl<=0.001, bytes<=8.5GB, worst:8 or sqnr_output>=30"


@dataclass(frozen=True, slots=True)
class Budget:
    """What may be spent: `kl`, at most so much, `bytes`, `sqnr_output`, at least so much, or `worst`, so many parts."""

    kind: str
    value: float

    @property
    def text(self) -> str:
        """As it is typed."""
        sign = {"kl": "<=", "bytes": "<=", "sqnr_output": ">="}.get(self.kind, ":")
        return f"{self.kind}{sign}{self.value:g}" if self.kind != "bytes" else f"bytes<={self.value:.0f}"


def parse_budget(text: str) -> Budget:
    """Return the budget of a text such as `kl<=0.001`; RecipeError if it is none."""
    match = re.fullmatch(r"\s*(?:(kl|bytes)\s*<=?|(sqnr_output)\s*>=?|(worst)\s*:)\s*(\S+)\s*", str(text))
    kind = next(filter(None, match.groups()[:3]), "") if match else ""
    if match and kind == "bytes":
        return Budget(kind, parse_size("keep", match[4]))
    if match and kind == "worst":
        return Budget(kind, parse_count("keep", match[4], least=1))
    if match and re.fullmatch(r"\d+(\.\d+)?([eE]-?\d+)?", match[4]):
        return Budget(kind, float(match[4]))
    raise RecipeError(f"keep {text!r} is no budget", f"write {BUDGETS}")


@dataclass(frozen=True, slots=True)
class Cost:
    """What weights cost together when they alone are in FP8: KL divergence, and the worst SQNR of their outputs."""

    tensors: tuple[str, ...]
    kl: float
    sqnr: float = math.inf


@dataclass(frozen=True, slots=True)
class Step:
    """A point of the frontier: so many parts are kept, in this many bytes, at this sum of KL divergences."""

    parts: int
    nbytes: int
    kl: float


@dataclass(frozen=True, slots=True)
class Choice:
    """The weights that stay, by name; the whole frontier, from none kept to all; and which of its points this is.

    kl: the sum of what each part that is packed costs alone.
    """

    kept: tuple[str, ...]
    frontier: tuple[Step, ...]
    chosen: Step


@dataclass(slots=True)
class _Part:
    tensors: list[str]
    extra: int
    kl: float
    sqnr: float


def choose_kept(tensors: Sequence[TensorPlan], costs: Sequence[Cost], budget: Budget, factor: float = 1.0) -> Choice:
    """Return which packed weights stay as they are, those first that gain most for a byte.

    Weights that engines fuse, and the experts of a layer, stay together. factor: by how much all parts together cost
        more than the sum of each alone, as a measurement showed.

    Raises:
        RecipeError: the budget cannot be met, or no weight was measured.
    """
    parts = _parts(tensors, costs)
    if not parts:
        raise RecipeError("the sensitivity names no weight that is packed", "measure it with the same scheme")
    base = sum(tensor.data.nbytes + (tensor.packing.scale.nbytes if tensor.packing else 0) for tensor in tensors)
    order = sorted(parts, key=lambda part: (-part.kl / max(part.extra, 1), part.tensors))
    if budget.kind == "worst":
        order = sorted(parts, key=lambda part: (-part.kl, part.tensors))

    def step(kept: Sequence[_Part]) -> Step:
        names = {part.tensors[0] for part in kept}
        left = [part.kl for part in order if part.tensors[0] not in names]
        return Step(len(kept), base + sum(part.extra for part in kept), factor * math.fsum(left))

    steps = [step(order[:count]) for count in range(len(order) + 1)]
    chosen = _choose(order, steps, budget)
    kept = sorted(name for part in chosen for name in part.tensors)
    return Choice(tuple(kept), tuple(steps), step(chosen))


def _choose(order: Sequence[_Part], steps: Sequence[Step], budget: Budget) -> list[_Part]:
    match budget.kind:
        case "kl":
            for step in steps:
                if step.kl <= budget.value or step.parts == len(order):
                    return list(order[: step.parts])
        case "bytes":
            if steps[0].nbytes > budget.value:
                raise RecipeError(f"{steps[0].nbytes} bytes are needed with every weight packed", "allow more")
            chosen, nbytes = [], steps[0].nbytes
            for part in order:
                if part.kl > 0 and nbytes + part.extra <= budget.value:
                    chosen.append(part)
                    nbytes += part.extra
            return chosen
        case "worst":
            return list(order[: int(budget.value)])
    return [part for part in order if part.sqnr < budget.value]


def _parts(tensors: Sequence[TensorPlan], costs: Iterable[Cost]) -> list[_Part]:
    """The packed weights that were measured, in parts that stay together."""
    packed = {tensor.spec.name: tensor for tensor in tensors if tensor.packing is not None}
    group_of: dict[str, str] = {}

    def find(key: str) -> str:
        while group_of.setdefault(key, key) != key:
            key = group_of[key]
        return key

    groups: Mapping[str, str] = {name: together(name) or name for name in packed}
    found: dict[str, _Part] = {}
    measured = [(cost, [name for name in cost.tensors if name in packed]) for cost in costs]
    for _, names in measured:
        for name in names:
            group_of[find(groups[name])] = find(groups[names[0]])
    for cost, names in measured:
        if names:
            part = found.setdefault(find(groups[names[0]]), _Part([], 0, 0.0, cost.sqnr))
            part.kl += cost.kl
            part.sqnr = min(part.sqnr, cost.sqnr)
    for name, tensor in packed.items():
        part_of = found.get(find(groups[name]))
        if part_of is not None and tensor.packing is not None:
            part_of.tensors.append(name)
            part_of.extra += tensor.spec.nbytes - tensor.data.nbytes - tensor.packing.scale.nbytes
    return list(found.values())
