"""`inspect`: what a checkpoint holds, packed or not, and how much quantization took away."""

import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fp8pack.checkpoint.calibration_file import is_calibration, read_calibration
from fp8pack.checkpoint.manifest_schema import Manifest, PackedEntry, check_headers
from fp8pack.checkpoint.quantized import read_contents
from fp8pack.checkpoint.source import Source, open_checkpoint
from fp8pack.checkpoint.values import ValueReader, strips
from fp8pack.engines.judge import judge_engines
from fp8pack.engines.known import NAMES, parse_targets
from fp8pack.engines.scale_layouts import scale_problem
from fp8pack.errors import BoundError, InputError, RecipeError
from fp8pack.machine import usable_cores
from fp8pack.modelfacts.contents import Contents, Quantized
from fp8pack.modelfacts.experts import split_experts
from fp8pack.modelfacts.roles import judge
from fp8pack.modelfacts.spec import FLOAT_DTYPES, Stored, TensorSpec
from fp8pack.numerics.metrics import energies, sqnr_db
from fp8pack.packing.workers import Stop, run_threads
from fp8pack.planning.calibration_facts import calibration_facts

METRICS = ("sqnr_min", "sqnr_mean")


@dataclass(frozen=True, slots=True)
class Bound:
    """A `--fail-if` bound: broken when the metric lies below (`<`) or above (`>`) the value."""

    metric: str
    sign: str
    value: float


def parse_bound(text: str) -> Bound:
    """Return the bound of a text such as `sqnr_min<28`."""
    match = re.fullmatch(r"\s*(\w+)\s*([<>])\s*(-?\d+(?:\.\d+)?)\s*", text)
    if match is None or match[1] not in METRICS:
        raise RecipeError(
            f"--fail-if {text!r} is not understood: write METRIC<VALUE with a metric of {', '.join(METRICS)}"
        )
    return Bound(match[1], match[2], float(match[3]))


def inspect(
    checkpoint: str | Path,
    against: str | Path | None = None,
    *,
    targets: Sequence[str] = (),
    tp: int | None = None,
    gpu: str | None = None,
) -> dict[str, Any]:
    """Return what a checkpoint of any convention or a calibration file holds, and which engines load it.

    against: the source of a packed checkpoint, for the SQNR of every packed weight. targets, tp, gpu: the engines that
        are asked about, and what they are to run on.

    Raises:
        InputError: the checkpoint or the source is malformed, or the two do not belong together.
    """
    path = Path(checkpoint)
    if path.is_file() and is_calibration(path):
        if against is not None:
            raise InputError(f"{checkpoint} is a calibration: nothing in it can be held against weights")
        return {"schema": 1, "calibration": str(path), **calibration_facts(read_calibration(path), every_site=True)}
    opened = open_checkpoint(path)
    contents = read_contents(opened)
    manifest = opened.manifest
    if manifest is not None:
        check_headers(opened.specs, manifest)
    if against is not None and not contents.quantized:
        raise InputError(f"{checkpoint} holds no FP8 weight: there is nothing to hold against {against}")
    sqnr = _measure(opened, contents, Path(against)) if against is not None else {}
    with ValueReader(opened, contents) as reader:
        tensors = [_entry(spec, contents, manifest, reader) | _sqnr(sqnr, spec.name) for spec in contents.tensors]
    verdicts = _verdicts(opened, contents, parse_targets(targets), tp, gpu)
    return _facts(opened, contents, manifest, tensors) | {"engines": verdicts, "warnings": _warnings(contents)}


def check_targets(facts: dict[str, Any]) -> None:
    """Raise BoundError for the first engine asked about that does not load the checkpoint."""
    for verdict in facts.get("engines", ()):
        if verdict["asked"] and not verdict["tp"]:
            remedy = f": {verdict['remedy']}" if verdict["remedy"] else ""
            raise BoundError(f"{NAMES[verdict['engine']]} does not load it: {verdict['reason']}{remedy}")


def check_bounds(facts: dict[str, Any], bounds: list[Bound]) -> None:
    """Raise BoundError for the first bound that the facts break; RecipeError if a metric was not measured."""
    for bound in bounds:
        totals = facts.get("totals", {})
        value = totals.get(bound.metric)
        if value is None and totals.get("num_equal", -1) == totals.get("num_tensors"):
            continue  # two checkpoints without a difference
        if value is None:
            raise RecipeError(f"--fail-if {bound.metric}: it is measured with --against SOURCE")
        if value < bound.value if bound.sign == "<" else value > bound.value:
            raise BoundError(f"{bound.metric} is {value:.2f}, which is {bound.sign} {bound.value:g}")


def _facts(
    opened: Source, contents: Contents, manifest: Manifest | None, tensors: list[dict[str, Any]]
) -> dict[str, Any]:
    sqnr = {tensor["name"]: tensor["sqnr"] for tensor in tensors if tensor.get("sqnr") is not None}
    worst = min(sqnr, key=lambda name: sqnr[name], default=None)
    return {
        "schema": 1,
        "checkpoint": str(opened.path),
        "architecture": opened.facts.architecture,
        "quant_method": contents.method,
        "recipe": manifest.recipe if manifest else None,
        "root": manifest.root if manifest else None,
        "tensors": tensors,
        "totals": {
            "num_tensors": len(tensors),
            "num_packed": len(contents.quantized),
            "nbytes": sum(spec.nbytes for spec in opened.specs),
            "packed_nbytes": sum(tensor["nbytes"] for tensor in tensors if tensor["name"] in contents.quantized),
            "sqnr_min": sqnr[worst] if worst else None,
            "sqnr_mean": float(np.mean(list(sqnr.values()))) if sqnr else None,
            "sqnr_worst_tensor": worst,
        },
    }


def _entry(spec: TensorSpec, contents: Contents, manifest: Manifest | None, reader: ValueReader) -> dict[str, Any]:
    recorded, quantized = manifest.tensors.get(spec.name) if manifest else None, contents.quantized.get(spec.name)
    if recorded is not None:
        about = {"action": recorded.action, "role": recorded.role, "reason": recorded.reason}
    else:
        about = _guess(spec, contents, quantized)
    tensor = {"name": spec.name, **about, "dtype": spec.dtype, "shape": list(spec.shape), "nbytes": spec.nbytes}
    if recorded is not None and recorded.activation_scales:
        tensor["activation_scales"] = {scale.kind: scale.value for scale in recorded.activation_scales}
    if quantized is not None:
        scales = reader.scales(spec)
        tensor |= {"format": quantized.format.name, "granularity": quantized.granularity.name}
        tensor["amax"] = recorded.amax if isinstance(recorded, PackedEntry) else None
        name = quantized.scale.name if quantized.scale else None
        if scales.size:
            tensor["scale"] = {"tensor": name, "min": float(scales.min()), "max": float(scales.max())}
    return tensor


def _guess(spec: TensorSpec, contents: Contents, quantized: Quantized | None) -> dict[str, Any]:
    """What can be said of a tensor that fp8pack did not write."""
    if quantized is not None:
        role = judge(replace(spec, dtype="BF16"), contents.facts).role
        return {"action": "packed", "role": role, "reason": "FP8 in the file"}
    verdict = judge(spec, contents.facts)
    reason = "not packed; pack would take it" if verdict.packed and not contents.quantized else verdict.reason
    return {"action": "stored", "role": verdict.role, "reason": reason}


def _sqnr(measured: dict[str, float], name: str) -> dict[str, float]:
    return {"sqnr": measured[name]} if name in measured else {}


def _measure(opened: Source, contents: Contents, against: Path) -> dict[str, float]:
    """The SQNR of every FP8 weight over all of its elements."""
    source = open_checkpoint(against)
    whole = Contents("", source.specs, source.facts)
    origins = {spec.name: spec for spec in (*split_experts(whole).tensors, *whole.tensors)}
    found: dict[str, float] = {}

    def work(spec: TensorSpec) -> None:
        origin = origins.get(spec.name)
        if origin is None or origin.shape != spec.shape or origin.dtype not in FLOAT_DTYPES:
            raise InputError(
                f"{source.path} holds no weight {spec.name!r} of shape {list(spec.shape)}: it is not the source"
            )
        with ValueReader(opened, contents) as ours, ValueReader(source, whole) as theirs:
            signal = noise = 0.0
            for lo, hi in strips(spec):
                exact = theirs.values(origin, lo, hi)
                energy = energies(exact, ours.values(spec, lo, hi))
                signal, noise = signal + energy[0], noise + energy[1]
        found[spec.name] = sqnr_db(signal, noise)

    packed = [spec for spec in contents.tensors if spec.name in contents.quantized]
    run_threads([packed], lambda: nullcontext(work), count=usable_cores(), stop=Stop(), tick=lambda: None)
    return found


def _verdicts(
    opened: Source, contents: Contents, targets: tuple[str, ...], tp: int | None, gpu: str | None
) -> list[dict[str, Any]]:
    """Who loads an FP8 checkpoint; of those asked about, whether anything else was asked for or not."""
    storage = contents.storage
    if storage is None:
        if targets:
            raise InputError(f"{opened.path} holds no FP8 weight: any engine that knows the model loads it")
        return []
    split = split_experts(contents)
    packed = [
        (spec, judge(replace(spec, dtype="BF16"), contents.facts).role)
        for spec in split.tensors
        if spec.name in split.quantized and len(spec.shape) == 2
    ]
    verdicts = judge_engines(storage, packed, contents.facts, tp=tp, gpu=gpu, kept=contents.kept)
    return [
        {
            "engine": verdict.engine,
            "asked": verdict.engine in targets,
            "tp": list(verdict.tp),
            "note": verdict.note,
            "reason": verdict.reason,
            "remedy": verdict.remedy,
        }
        for verdict in verdicts
        if not targets or verdict.engine in targets
    ]


def _warnings(contents: Contents) -> list[str]:
    """Scales that are not what the readers of their convention want; only somebody else's are."""
    storage = contents.storage
    if storage is None:
        return []
    problems = []
    for spec in contents.tensors:
        scale = contents.quantized[spec.name].scale if spec.name in contents.quantized else None
        if scale is not None and len(spec.shape) == 2:
            stored = Stored(scale.name, scale.dtype, scale.shape)
            problems.append(scale_problem(storage, spec.name, spec.shape, stored))
    found = [problem for problem in problems if problem]
    return [f"{found[0]}; {len(found)} scales are not what engines' code was read to want"] if found else []
