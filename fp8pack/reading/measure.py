"""Every quantized weight of a checkpoint against its source, over all elements."""

from collections.abc import Callable, Container
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from fp8pack.checkpoint.source import Source, open_checkpoint
from fp8pack.checkpoint.values import ValueReader, strips
from fp8pack.errors import InputError
from fp8pack.machine import usable_cores
from fp8pack.modelfacts.contents import Contents
from fp8pack.modelfacts.experts import split_experts
from fp8pack.modelfacts.prefixes import strip_prefixes
from fp8pack.modelfacts.spec import FLOAT_DTYPES, TensorSpec
from fp8pack.numerics.metrics import ErrorTally, OutputTally, widen
from fp8pack.packing.workers import Stop, run_threads
from fp8pack.reading.inputs_of import Inputs

OnProgress = Callable[[int, int], None]


class Origin:
    """The source of a checkpoint: its weights under the names that the checkpoint has for them."""

    def __init__(self, opened: Source, path: Path) -> None:
        """`opened`: the checkpoint; `path`: the source."""
        self.source = open_checkpoint(path)
        prefixes = opened.manifest.recipe.get("strip_prefix", ()) if opened.manifest else ()
        self.contents = Contents("", strip_prefixes(self.source.specs, prefixes), self.source.facts)
        split = (*split_experts(self.contents).tensors, *self.contents.tensors)
        self._specs = {spec.name: spec for spec in split}

    def of(self, spec: TensorSpec) -> TensorSpec:
        """Return the weight that a quantized one comes from; InputError if there is none."""
        found = self._specs.get(spec.name)
        if found is None or found.shape != spec.shape or found.dtype not in FLOAT_DTYPES:
            raise InputError(
                f"{self.source.path} has no weight {spec.name!r} of shape {list(spec.shape)}: it is not the source"
            )
        return found


@dataclass(frozen=True, slots=True)
class Measured:
    """A weight against its source, and its output if the calibration has statistics of its input."""

    error: ErrorTally
    output: OutputTally | None


def measure(
    opened: Source,
    contents: Contents,
    origin: Origin,
    *,
    without: Container[str],
    inputs: Inputs | None = None,
    on_progress: OnProgress,
) -> dict[str, Measured]:
    """Compare the quantized weights with the source, but those of names in `without`; progress is in bytes of it."""
    weights = [spec for spec in contents.tensors if spec.name in contents.quantized and spec.name not in without]
    total, done, lock = sum(origin.of(spec).nbytes for spec in weights), 0, Lock()
    found: dict[str, Measured] = {}

    def work(spec: TensorSpec) -> None:
        nonlocal done
        exact = origin.of(spec)
        tally = ErrorTally(contents.quantized[spec.name].format, exact.dtype)
        output = None if inputs is None else inputs.tally_of(spec.name, contents.activations)
        with ValueReader(opened, contents) as ours, ValueReader(origin.source, origin.contents) as theirs:
            for lo, hi in strips(spec):
                bits = theirs.bits(exact, lo, hi)
                values, codes = ours.dequantized(spec, lo, hi)
                tally.add(bits, values, codes)
                if output is not None:
                    output.add(widen(bits, exact.dtype), values)
                with lock:
                    done += bits.nbytes
        found[spec.name] = Measured(tally, output)

    def tick() -> None:
        on_progress(done, total)

    run_threads([weights], lambda: nullcontext(work), count=usable_cores(), stop=Stop(), tick=tick)
    return found
