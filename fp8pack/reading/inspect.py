"""`inspect`: the tensors of a checkpoint, their SQNR against the source, and the engines that load it."""

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fp8pack.bounds import parse_bounds
from fp8pack.checkpoint.calibration_file import is_calibration, read_calibration
from fp8pack.checkpoint.manifest_schema import CastEntry, Manifest, PackedEntry, check_headers
from fp8pack.checkpoint.quantized import read_contents
from fp8pack.checkpoint.scales import num_bad
from fp8pack.checkpoint.source import Source, find_checkpoint, open_checkpoint
from fp8pack.checkpoint.values import ValueReader
from fp8pack.engines.case import make_case
from fp8pack.engines.judge import EngineVerdict, judge_engines
from fp8pack.engines.known import id_of, parse_targets
from fp8pack.engines.scale_layouts import scale_problem
from fp8pack.errors import InputError, RecipeError
from fp8pack.inputs import Texts, parse_count, parse_path, parse_texts
from fp8pack.modelfacts.contents import Contents, Quantized
from fp8pack.modelfacts.experts import split_experts
from fp8pack.modelfacts.roles import judge
from fp8pack.modelfacts.spec import DTYPE_BITS, Stored, TensorSpec
from fp8pack.planning.calibration_summary import CalibrationSummary, summarize
from fp8pack.planning.recipe import MAX_TP
from fp8pack.reading.bounds import INSPECTION_METRICS, check_bounds
from fp8pack.reading.inputs_of import read_inputs
from fp8pack.reading.inspection import Inspection, ScaleRange, TensorInspection, Totals
from fp8pack.reading.measure import Measured, OnProgress, Origin, measure


def inspect(  # noqa: PLR0913
    checkpoint: str | Path,
    against: str | Path | None = None,
    *,
    fail_if: Texts = (),
    targets: Texts = (),
    tp: int | None = None,
    ep: int | None = None,
    gpu: str | None = None,
    calibration: str | Path | None = None,
    on_progress: OnProgress = lambda done, total: None,
) -> Inspection:
    """Return the tensors of a checkpoint of any quant method, and the engines that load it.

    against: the source of an FP8 checkpoint: measures the SQNR and other errors of every FP8 weight. fail_if: bounds
        such as "sqnr_min<28". targets, tp, ep, gpu: the engines to judge, and what they run on; `.engines` has the
        verdicts.
    calibration: of the source: predicts the SQNR of each output from the mean squares of its input channels.
    on_progress: called with (bytes done, bytes in all) of the source.

    Raises:
        InputError: the checkpoint or the source is malformed, or the source is of another checkpoint.
        VerificationError: a scale or a weight is a NaN or infinity.
        BoundError: a bound is broken.
        RecipeError: an option is out of range or not known.
    """
    bounds = parse_bounds(fail_if, INSPECTION_METRICS)
    asked = parse_targets(parse_texts("targets", targets, commas=True))
    found = look(
        checkpoint, against, targets=asked, tp=tp, ep=ep, gpu=gpu, calibration=calibration, on_progress=on_progress
    )
    found.check()
    check_bounds(found, bounds)
    return found


def look(  # noqa: PLR0913
    checkpoint: str | Path,
    against: str | Path | None = None,
    *,
    targets: tuple[str, ...] = (),
    tp: int | str | None = None,
    ep: int | str | None = None,
    gpu: str | None = None,
    calibration: str | Path | None = None,
    on_progress: OnProgress = lambda done, total: None,
) -> Inspection:
    """Return what `inspect` does, without checking values and bounds."""
    path = find_checkpoint(parse_path("checkpoint", checkpoint))
    if path.is_file() and is_calibration(path):
        raise InputError(f"{path} is a calibration file, not a checkpoint", "fp8pack.inspect_calibration() reads it")
    size = None if tp is None else parse_count("tp", tp, least=1, most=MAX_TP)
    groups = None if ep is None else parse_count("ep", ep, least=1, most=MAX_TP)
    opened = open_checkpoint(path)
    contents = read_contents(opened)
    manifest = opened.manifest
    if manifest is not None:
        check_headers(opened.specs, manifest)
    if calibration is not None and against is None:
        raise RecipeError("the source of the weights is needed, too", "--against SOURCE")
    if against is not None and not contents.quantized:
        raise InputError(f"{checkpoint} has no FP8 weight to compare with {against}", "leave out --against")
    origin = None if against is None else Origin(opened, parse_path("against", against))
    with ValueReader(opened, contents) as reader:
        tensors = [entry_of(spec, contents, manifest, reader) for spec in contents.tensors]
    if origin is not None:
        spoiled = {tensor.name for tensor in tensors if tensor.problem}
        inputs = None if calibration is None else read_inputs(parse_path("calibration", calibration), origin.source)
        tallies = measure(opened, contents, origin, without=spoiled, inputs=inputs, on_progress=on_progress)
        tensors = [with_errors(tensor, tallies.get(tensor.name)) for tensor in tensors]
    return Inspection(
        checkpoint=opened.path,
        against=origin.source.path if origin else None,
        architecture=opened.facts.architecture,
        quant_method=contents.method,
        recipe=manifest.recipe if manifest else None,
        root=manifest.root if manifest else None,
        tensors=tuple(tensors),
        totals=_totals(opened, contents, tensors),
        engines=_verdicts(opened, contents, targets, size, groups, gpu),
        warnings=tuple(_warnings(contents)),
    )


def inspect_calibration(path: str | Path) -> CalibrationSummary:
    """Return the statistics of a calibration file, site by site; InputError if it is malformed."""
    file = parse_path("calibration", path)
    return summarize(read_calibration(file), output=file, every_site=True)


def _totals(opened: Source, contents: Contents, tensors: Sequence[TensorInspection]) -> Totals:
    num_spoiled = sum(bool(tensor.problem) for tensor in tensors)
    measured = [(tensor.sqnr, tensor.name) for tensor in tensors if tensor.sqnr is not None]
    cosines = [tensor.error.cosine for tensor in tensors if tensor.error and tensor.error.cosine is not None]
    outputs = [tensor.output_sqnr for tensor in tensors if tensor.output_sqnr is not None]
    if num_spoiled:
        measured, cosines, outputs = [], [], []  # a mean over the others would hide it
    worst = min(measured, default=None)
    return Totals(
        num_tensors=len(tensors),
        num_packed=len(contents.quantized),
        nbytes=sum(spec.nbytes for spec in opened.specs),
        packed_nbytes=sum(tensor.nbytes for tensor in tensors if tensor.name in contents.quantized),
        source_nbytes=sum(_nbytes_before(tensor) for tensor in tensors),
        num_spoiled=num_spoiled,
        sqnr_min=worst[0] if worst else None,
        sqnr_mean=float(np.mean([sqnr for sqnr, _ in measured])) if measured else None,
        sqnr_worst_tensor=worst[1] if worst else None,
        cosine_min=min(cosines, default=None),
        output_sqnr_min=min(outputs, default=None),
    )


def _nbytes_before(tensor: TensorInspection) -> int:
    """The bytes of a tensor in its source."""
    if tensor.source_dtype is None:
        return tensor.nbytes
    return prod(tensor.shape) * DTYPE_BITS[tensor.source_dtype] // 8


def with_errors(tensor: TensorInspection, found: Measured | None) -> TensorInspection:
    """Return a tensor with what was measured of it."""
    if found is None:
        return tensor
    output = found.output.sqnr if found.output is not None else None
    return replace(tensor, sqnr=found.error.sqnr, error=found.error.error, output_sqnr=output)


def entry_of(spec: TensorSpec, contents: Contents, manifest: Manifest | None, reader: ValueReader) -> TensorInspection:
    """Return a tensor as the manifest and the files describe it; weights are not read."""
    recorded, quantized = manifest.tensors.get(spec.name) if manifest else None, contents.quantized.get(spec.name)
    if recorded is not None:
        action, role, reason = str(recorded.action), recorded.role, recorded.reason
    else:
        action, role, reason = _guess(spec, contents, quantized)
    scales = recorded.activation_scales if recorded is not None else None
    tensor = TensorInspection(
        *(spec.name, action, role, reason, spec.dtype, spec.shape, spec.nbytes),
        activation_scales={scale.kind: scale.value for scale in scales} if scales else None,
        source_dtype=recorded.source_dtype if isinstance(recorded, CastEntry) else None,
    )
    if quantized is None:
        return tensor
    return replace(
        tensor,
        format=quantized.format.name,
        granularity=quantized.granularity.name,
        source_dtype=recorded.source_dtype if isinstance(recorded, PackedEntry) else quantized.source_dtype,
        amax=recorded.amax if isinstance(recorded, PackedEntry) else None,
        scale=_scale_range(quantized.scale.name if quantized.scale else None, reader.scales(spec)),
    )


def _scale_range(name: str | None, scales: NDArray[np.float32]) -> ScaleRange | None:
    if not scales.size:
        return None
    bad = num_bad(scales)
    good = scales[np.isfinite(scales) & (scales >= 0)] if bad else scales
    if not good.size:
        return ScaleRange(name, None, None, bad)
    return ScaleRange(name, float(good.min()), float(good.max()), bad)


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


def _verdicts(
    opened: Source, contents: Contents, targets: tuple[str, ...], tp: int | None, ep: int | None, gpu: str | None
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
    case = make_case(storage, packed, contents.facts, tp=tp, ep=ep, gpu=gpu, ignored=contents.ignored)
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
