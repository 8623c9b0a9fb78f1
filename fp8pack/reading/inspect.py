"""`inspect`: the tensors of a checkpoint, their SQNR against the source, and the engines that load it."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np

from fp8pack.checkpoint.calibration_file import is_calibration, read_calibration
from fp8pack.checkpoint.manifest_schema import Manifest, PackedEntry, check_headers
from fp8pack.checkpoint.quantized import read_contents
from fp8pack.checkpoint.source import Source, find_checkpoint, open_checkpoint
from fp8pack.checkpoint.values import ValueReader, strips
from fp8pack.engines.case import make_case
from fp8pack.engines.judge import EngineVerdict, judge_engines
from fp8pack.engines.known import id_of, parse_targets
from fp8pack.engines.scale_layouts import scale_problem
from fp8pack.errors import InputError
from fp8pack.inputs import Texts, parse_count, parse_path, parse_texts
from fp8pack.machine import usable_cores
from fp8pack.modelfacts.contents import Contents, Quantized
from fp8pack.modelfacts.experts import split_experts
from fp8pack.modelfacts.prefixes import strip_prefixes
from fp8pack.modelfacts.roles import judge
from fp8pack.modelfacts.spec import FLOAT_DTYPES, Stored, TensorSpec
from fp8pack.numerics.metrics import energies, sqnr_db
from fp8pack.packing.workers import Stop, run_threads
from fp8pack.planning.calibration_summary import CalibrationSummary, summarize
from fp8pack.planning.recipe import MAX_TP
from fp8pack.reading.bounds import check_bounds, parse_bounds
from fp8pack.reading.inspection import Inspection, ScaleRange, TensorInspection, Totals


def inspect(
    checkpoint: str | Path,
    against: str | Path | None = None,
    *,
    fail_if: Texts = (),
    targets: Texts = (),
    tp: int | None = None,
    gpu: str | None = None,
) -> Inspection:
    """Return the tensors of a checkpoint of any quant method, and the engines that load it.

    against: the source of an FP8 checkpoint: measures the SQNR of every FP8 weight. fail_if: bounds such as
        "sqnr_min<28". targets, tp, gpu: the engines to judge, and what they run on; `.engines` has the verdicts.

    Raises:
        InputError: the checkpoint or the source is malformed, or the source is of another checkpoint.
        BoundError: a bound is broken.
        RecipeError: an option is out of range or not known.
    """
    bounds, asked = parse_bounds(fail_if), parse_targets(parse_texts("targets", targets, commas=True))
    found = look(checkpoint, against, targets=asked, tp=tp, gpu=gpu)
    check_bounds(found, bounds)
    return found


def look(
    checkpoint: str | Path,
    against: str | Path | None = None,
    *,
    targets: tuple[str, ...] = (),
    tp: int | str | None = None,
    gpu: str | None = None,
) -> Inspection:
    """Return what `inspect` does, without checking bounds."""
    path = find_checkpoint(parse_path("checkpoint", checkpoint))
    if path.is_file() and is_calibration(path):
        raise InputError(f"{path} is a calibration file, not a checkpoint", "fp8pack.inspect_calibration() reads it")
    size = None if tp is None else parse_count("tp", tp, least=1, most=MAX_TP)
    opened = open_checkpoint(path)
    contents = read_contents(opened)
    manifest = opened.manifest
    if manifest is not None:
        check_headers(opened.specs, manifest)
    if against is not None and not contents.quantized:
        raise InputError(f"{checkpoint} has no FP8 weight to compare with {against}", "leave out --against")
    sqnr = {} if against is None else _measure(opened, contents, parse_path("against", against))
    with ValueReader(opened, contents) as reader:
        tensors = tuple(_entry(spec, contents, manifest, reader, sqnr.get(spec.name)) for spec in contents.tensors)
    return Inspection(
        checkpoint=opened.path,
        architecture=opened.facts.architecture,
        quant_method=contents.method,
        recipe=manifest.recipe if manifest else None,
        root=manifest.root if manifest else None,
        tensors=tensors,
        totals=_totals(opened, contents, tensors),
        engines=_verdicts(opened, contents, targets, size, gpu),
        warnings=tuple(_warnings(contents)),
    )


def inspect_calibration(path: str | Path) -> CalibrationSummary:
    """Return the statistics of a calibration file, site by site; InputError if it is malformed."""
    file = parse_path("calibration", path)
    return summarize(read_calibration(file), output=file, every_site=True)


def _totals(opened: Source, contents: Contents, tensors: Sequence[TensorInspection]) -> Totals:
    sqnr = {tensor.name: tensor.sqnr for tensor in tensors if tensor.sqnr is not None}
    worst = min(sqnr, key=lambda name: sqnr[name], default=None)
    return Totals(
        num_tensors=len(tensors),
        num_packed=len(contents.quantized),
        nbytes=sum(spec.nbytes for spec in opened.specs),
        packed_nbytes=sum(tensor.nbytes for tensor in tensors if tensor.name in contents.quantized),
        sqnr_min=sqnr[worst] if worst else None,
        sqnr_mean=float(np.mean(list(sqnr.values()))) if sqnr else None,
        sqnr_worst_tensor=worst,
    )


def _entry(
    spec: TensorSpec, contents: Contents, manifest: Manifest | None, reader: ValueReader, sqnr: float | None
) -> TensorInspection:
    recorded, quantized = manifest.tensors.get(spec.name) if manifest else None, contents.quantized.get(spec.name)
    if recorded is not None:
        action, role, reason = str(recorded.action), recorded.role, recorded.reason
    else:
        action, role, reason = _guess(spec, contents, quantized)
    scales = recorded.activation_scales if recorded is not None else None
    tensor = TensorInspection(
        *(spec.name, action, role, reason, spec.dtype, spec.shape, spec.nbytes),
        activation_scales={scale.kind: scale.value for scale in scales} if scales else None,
        sqnr=sqnr,
    )
    if quantized is None:
        return tensor
    values = reader.scales(spec)
    name = quantized.scale.name if quantized.scale else None
    return replace(
        tensor,
        format=quantized.format.name,
        granularity=quantized.granularity.name,
        amax=recorded.amax if isinstance(recorded, PackedEntry) else None,
        scale=ScaleRange(name, float(values.min()), float(values.max())) if values.size else None,
    )


def _guess(spec: TensorSpec, contents: Contents, quantized: Quantized | None) -> tuple[str, str, str]:
    """Action, role and reason of a tensor that fp8pack did not write."""
    if quantized is not None:
        role = judge(replace(spec, dtype="BF16"), contents.facts).role
        return "packed", role, f"{quantized.kind} in the file"
    verdict = judge(spec, contents.facts)
    reason = (
        "not packed; `fp8pack pack` would quantize it" if verdict.packed and not contents.quantized else verdict.reason
    )
    return "stored", verdict.role, reason


def _measure(opened: Source, contents: Contents, against: Path) -> dict[str, float]:
    """The SQNR of every FP8 weight over all of its elements."""
    source = open_checkpoint(against)
    prefixes = opened.manifest.recipe.get("strip_prefix", ()) if opened.manifest else ()
    whole = Contents("", strip_prefixes(source.specs, prefixes), source.facts)
    origins = {spec.name: spec for spec in (*split_experts(whole).tensors, *whole.tensors)}
    found: dict[str, float] = {}

    def work(spec: TensorSpec) -> None:
        origin = origins.get(spec.name)
        if origin is None or origin.shape != spec.shape or origin.dtype not in FLOAT_DTYPES:
            raise InputError(
                f"{source.path} has no weight {spec.name!r} of shape {list(spec.shape)}: it is not the source"
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
) -> tuple[EngineVerdict, ...]:
    """The verdicts of the engines that were asked for, or of all, on an FP8 checkpoint."""
    storage = contents.storage
    if storage is None:
        if targets and contents.quantized:
            raise InputError(
                f"{opened.path} has no FP8 weight, and engines are judged for FP8 alone", "leave out --target"
            )
        if targets:
            raise InputError(
                f"{opened.path} has no FP8 weight: any engine that has the model loads it", "leave out --target"
            )
        return ()
    split = split_experts(contents)
    packed = [
        (spec, judge(replace(spec, dtype="BF16"), contents.facts).role)
        for spec in split.tensors
        if spec.name in split.quantized and len(spec.shape) == 2
    ]
    case = make_case(storage, packed, contents.facts, tp=tp, gpu=gpu, ignored=contents.ignored)
    verdicts = judge_engines(case, targets)
    return tuple(verdict for verdict in verdicts if not targets or verdict.engine in map(id_of, targets))


def _warnings(contents: Contents) -> list[str]:
    """Scales that engines read otherwise: only in checkpoints of other tools."""
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
    return [f"{found[0]}; {len(found)} scales are not as the engines read them"] if found else []
