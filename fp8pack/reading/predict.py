"""`predict_outputs`: what each linear's output would lose in every format and granularity, without running a model."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from fp8pack.checkpoint.quantized import read_contents
from fp8pack.checkpoint.source import open_checkpoint
from fp8pack.checkpoint.values import ValueReader
from fp8pack.documents import Document
from fp8pack.errors import InputError
from fp8pack.inputs import parse_choice, parse_path
from fp8pack.machine import usable_cores
from fp8pack.modelfacts.experts import split_experts
from fp8pack.modelfacts.roles import judge
from fp8pack.modelfacts.spec import FLOAT_DTYPES, TensorSpec
from fp8pack.numerics.metrics import widen
from fp8pack.packing.workers import Stop, run_threads
from fp8pack.reading.alternatives import CASES, quantized_strips
from fp8pack.reading.inputs_of import read_inputs
from fp8pack.reading.measure import OnProgress
from fp8pack.units import natural

ACTIVATIONS = ("dynamic", "static", "none")


@dataclass(frozen=True, slots=True)
class OutputPrediction:
    """A linear: the tokens that it saw, and the SQNR of its output in dB by format and granularity, `e4m3 channel`."""

    tensor: str
    tokens: int
    sqnr: Mapping[str, float | None]


@dataclass(frozen=True, slots=True, repr=False)
class OutputPredictions(Document):
    """Every linear of a model that the policy would pack; unseen: those that the calibration has no statistics of."""

    source: Path
    calibration: Path
    activations: str
    linears: tuple[OutputPrediction, ...]
    unseen: tuple[str, ...]


def predict_outputs(
    source: str | Path,
    calibration: str | Path,
    *,
    activations: str = "dynamic",
    on_progress: OnProgress = lambda done, total: None,
) -> OutputPredictions:
    """Predict the SQNR of each linear's output for every format and granularity, from a calibration.

    source: a checkpoint in floats. activations: how inputs are rounded to E4M3: dynamic, static or none.
    Input channels are taken for independent: the differences between columns hold better than their height.
    on_progress: called with (bytes done, bytes in all).

    Raises:
        InputError: a file is malformed, the calibration is of another model, or no weight is a float.
        RecipeError: activations are not known.
    """
    kind = parse_choice("activations", activations, ACTIVATIONS)
    opened = open_checkpoint(parse_path("source", source))
    contents = split_experts(read_contents(opened))
    path = parse_path("calibration", calibration)
    inputs = read_inputs(path, opened)
    weights = [
        spec
        for spec in contents.tensors
        if spec.dtype in FLOAT_DTYPES and len(spec.shape) == 2 and judge(spec, contents.facts).packed
    ]
    if not weights:
        raise InputError(f"{opened.path} has no float weight to quantize", "choose the source")
    seen = [spec for spec in weights if inputs.site_of(spec.name) is not None]
    total, done, lock = sum(spec.nbytes for spec in seen), 0, Lock()
    found: dict[str, OutputPrediction] = {}

    def work(spec: TensorSpec) -> None:
        nonlocal done
        tallies = {case: tally for case in CASES if (tally := inputs.tally_of(spec.name, kind)) is not None}
        with ValueReader(opened, contents) as reader:
            for bits, rounded in quantized_strips(reader, spec):
                exact = widen(bits, spec.dtype)
                for case, tally in tallies.items():
                    tally.add(exact, rounded[case][0])
                with lock:
                    done += bits.nbytes
        site = inputs.site_of(spec.name)
        sqnr = {str(case): tally.sqnr for case, tally in tallies.items()}
        found[spec.name] = OutputPrediction(spec.name, site.tokens if site else 0, sqnr)

    def tick() -> None:
        on_progress(done, total)

    run_threads([seen], lambda: nullcontext(work), count=usable_cores(), stop=Stop(), tick=tick)
    return OutputPredictions(
        source=opened.path,
        calibration=path,
        activations=kind,
        linears=tuple(found[name] for name in sorted(found, key=natural)),
        unseen=tuple(spec.name for spec in weights if spec.name not in found),
    )
