"""What is judged: the FP8 weights of a checkpoint, how they are stored, and where they shall run."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from fp8pack.engines.class_facts import ClassFacts, read_class_facts
from fp8pack.engines.engine import Engine, kind_of
from fp8pack.engines.gpus import Gpu, parse_gpu
from fp8pack.modelfacts.fused import fused_module, together
from fp8pack.modelfacts.model import ModelFacts
from fp8pack.modelfacts.patterns import star
from fp8pack.modelfacts.prefixes import wrapper_of
from fp8pack.modelfacts.storage import Storage
from fp8pack.modelfacts.tensor_parallel import Packed, tp_problem

TP_SIZES = (1, 2, 4, 8)
EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True)
class Weights:
    """FP8 weights [N, K] with their roles, and what their names tell: one value for all trials of a checkpoint."""

    packed: Packed

    @cached_property
    def wrapped(self) -> tuple[str, str]:
        """A prefix that a training wrapper left, and a name with it; empty if there is none."""
        found = ((prefix, spec.name) for spec, _ in self.packed if (prefix := wrapper_of(spec.name)))
        return next(found, ("", ""))

    @cached_property
    def modules(self) -> dict[str, str]:
        """Each FP8 module of an engine -> one of the checkpoint; one expert represents its layer."""
        one_expert = {EXPERT.sub(".experts.*.", spec.name): spec.name for spec, _ in reversed(self.packed)}
        parts = {name.removesuffix(".weight"): fused_module(name) for name in one_expert.values()}
        return {module: module for module in parts} | {fused: module for module, fused in parts.items() if fused}

    @cached_property
    def leaves(self) -> dict[str, str]:
        """The last part of each module's name -> the first module with it."""
        return {module.rpartition(".")[2]: module for module in reversed(self.modules.values())}

    @cached_property
    def stems(self) -> dict[str, str]:
        """The name of each module with `*` for numbers -> the first module with it."""
        found: dict[str, str] = {}
        for spec, _ in self.packed:
            module = spec.name.removesuffix(".weight")
            found.setdefault(star(module), module)
        return found

    @cached_property
    def num_experts(self) -> int:
        """How many experts a layer has; 0 if there are none."""
        return len({match[0] for spec, _ in self.packed if (match := EXPERT.search(spec.name))})

    @cached_property
    def groups(self) -> dict[str | None, str]:
        """Each fused module of an engine -> an FP8 part of it."""
        return {together(spec.name): spec.name.removesuffix(".weight") for spec, _ in reversed(self.packed)}


@dataclass(frozen=True)
class Case:
    """What is judged: FP8 weights and how they are stored, the model, the GPU, and the ignored modules."""

    storage: Storage
    weights: Weights
    facts: ModelFacts
    sizes: tuple[int, ...]
    gpu: Gpu | None = None
    ignored: tuple[str, ...] = ()
    ep: int = 1

    @property
    def packed(self) -> Packed:
        """The FP8 weights and their roles."""
        return self.weights.packed

    @cached_property
    def kind(self) -> str:
        """The storage as the rules name it."""
        return kind_of(self.storage)

    @cached_property
    def cuts(self) -> dict[int, str | None]:
        """Why the weights cannot be sharded at each tensor-parallel size, None if they can."""
        return {tp: tp_problem(self.packed, self.storage.granularity, tp, self.facts, self.ep) for tp in self.sizes}

    def built_by(self, engine: Engine) -> ClassFacts | None:
        """What the code of an engine says of this model's class, None if it has none or was not read."""
        known = read_class_facts(engine.facts)
        return known.classes.get(self.facts.architecture) if known else None


def make_case(  # noqa: PLR0913
    storage: Storage,
    packed: Packed,
    facts: ModelFacts,
    *,
    tp: int | None = None,
    ep: int | None = None,
    gpu: str | None = None,
    ignored: Sequence[str] = (),
) -> Case:
    """Return the case of a checkpoint.

    packed: the FP8 weights [N, K] and their roles. tp, gpu: default to the usual sizes and any GPU. ep: groups
        of GPUs among which experts are divided.
    ignored: the ignored modules, as the checkpoint lists them; empty if the list is unknown.
    """
    sizes = (tp,) if tp else tuple(size for size in TP_SIZES if size >= (ep or 1))
    return Case(storage, Weights(packed), facts, sizes, parse_gpu(gpu), tuple(ignored), ep or 1)
