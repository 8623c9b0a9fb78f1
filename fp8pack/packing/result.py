"""What writing a checkpoint will do, or did."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fp8pack.checkpoint.shard_writer import free_space
from fp8pack.documents import Document, html_table
from fp8pack.engines.judge import EngineVerdict
from fp8pack.packing.prepare import Prepared
from fp8pack.planning.keep import Choice
from fp8pack.planning.plan import Action, PackPlan, Plan, TensorPlan
from fp8pack.planning.recipe import Recipe
from fp8pack.units import format_seconds, format_size


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """What becomes of a tensor: `packed`, `copied`, `cast` or `unpacked`, and why.

    dtype: of the source, as safetensors spells it. format, granularity, scale: of a packed weight; `scale` is the name
    of its scale tensor. carried: the FP8 bytes are those of the source.
    """

    name: str
    action: str
    role: str
    reason: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    format: str | None = None
    granularity: str | None = None
    scale: str | None = None
    carried: bool = False


@dataclass(frozen=True, slots=True)
class SkippedFile:
    """A side file that is not copied, its size in bytes, and the rule that says so."""

    file: str
    size: int
    rule: str


@dataclass(frozen=True, slots=True)
class SchemeChoice:
    """The scheme of a packed checkpoint, and why it was chosen; `kept_dtype`: as asked, None is that of the source."""

    name: str
    reason: str
    format: str
    granularity: str
    scale_rounding: str
    activations: str
    quant_method: str
    kv_cache: bool
    kept_dtype: str | None = None
    scales: str = "amax"
    rounding: str = "nearest"


@dataclass(frozen=True, slots=True)
class Sqnr:
    """Signal to quantization noise against the source in dB, of weights or of outputs, on 8 rows of each band."""

    mean: float
    worst: float
    worst_tensor: str


def summarize_sqnr(sqnr: Mapping[str, float]) -> Sqnr | None:
    """Return mean and worst of the SQNR of each tensor, None without any."""
    worst = min(sqnr, key=lambda name: sqnr[name], default=None)
    return Sqnr(sum(sqnr.values()) / len(sqnr), sqnr[worst], worst) if worst else None


@dataclass(frozen=True, slots=True)
class Written:
    """What a run did: sizes in bytes; SQNR as in PackResult, None where nothing was quantized, or compensated."""

    root: str
    already_complete: bool
    seconds: float
    resumed_nbytes: int = 0
    peak_memory: int = 0
    sqnr: Sqnr | None = None
    output_sqnr: Sqnr | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, repr=False)
class PackResult(Document):
    """What `pack`, `convert` or `unpack` did, or would do in a dry run.

    scheme: None when unpacking. recipe: as the manifest records it. kept: every tensor that is not packed. tensors: all
    of them, in a dry run or when asked for, else empty. num_carried: packed weights whose FP8 bytes are the source's.
    targets, tp, ep: as asked. engines: who loads the output, empty when unpacking. free_nbytes: on its file system,
    before the work. root: of the manifest; None in a dry run, as are `seconds` and `peak_memory`. sqnr: of weights;
    output_sqnr: of the outputs of weights that were compensated, on the inputs of the calibration. choice: what `keep`
    chose.
    """

    verb: str
    model: str
    source: Path
    output: Path
    architecture: str
    source_dtypes: tuple[str, ...]
    scheme: SchemeChoice | None
    recipe: Mapping[str, object]
    num_tensors: int
    num_packed: int
    num_carried: int
    num_unpacked: int
    kept: tuple[PlannedTensor, ...]
    tensors: tuple[PlannedTensor, ...]
    skipped: tuple[SkippedFile, ...]
    source_nbytes: int
    output_nbytes: int
    free_nbytes: int
    targets: tuple[str, ...]
    tp: int | None
    ep: int | None
    engines: tuple[EngineVerdict, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    dry_run: bool
    already_complete: bool = False
    root: str | None = None
    seconds: float | None = None
    resumed_nbytes: int = 0
    peak_memory: int | None = None
    sqnr: Sqnr | None = None
    output_sqnr: Sqnr | None = None
    choice: Choice | None = None

    def _repr_html_(self) -> str:
        rows = [("source", f"{self.source} ({format_size(self.source_nbytes)})")]
        rows += [("output", f"{self.output} ({format_size(self.output_nbytes)})")]
        if self.scheme:
            rows += [("scheme", f"{self.scheme.name} ({self.scheme.reason})")]
        rows += [("packed", f"{self.num_packed} of {self.num_tensors} tensors")]
        if self.output_sqnr:
            rows += [("output SQNR", f"mean {self.output_sqnr.mean:.1f} dB, worst {self.output_sqnr.worst:.1f} dB")]
        if self.sqnr:
            rows += [("weight SQNR", f"mean {self.sqnr.mean:.1f} dB, worst {self.sqnr.worst:.1f} dB")]
        if self.seconds is not None:
            rows += [("time", format_seconds(self.seconds))]
        loads = [verdict.engine for verdict in self.engines if verdict.tp]
        rows += [("loads in", ", ".join(loads))] if loads else []
        title = f"fp8pack {self.verb}" + (" (dry run)" if self.dry_run else "")
        return html_table(title, ("", ""), rows)


def make_result(prepared: Prepared, written: Written | None = None, *, every_tensor: bool = False) -> PackResult:
    """Return the result of a pack, conversion or unpacking; of a dry run if nothing was written."""
    source, plan = prepared.source, prepared.plan
    return PackResult(
        verb=prepared.verb,
        model=source.name,
        source=source.path,
        output=prepared.output,
        architecture=plan.facts.architecture,
        source_dtypes=tuple(sorted({tensor.spec.dtype for tensor in plan.tensors})),
        scheme=_scheme(plan.recipe) if isinstance(plan, PackPlan) else None,
        recipe={**plan.selection, **plan.recipe_data},
        num_tensors=len(plan.tensors),
        num_packed=len(plan.packed),
        num_carried=sum(tensor.packing is not None and tensor.packing.carried for tensor in plan.tensors),
        num_unpacked=sum(tensor.action == Action.UNPACKED for tensor in plan.tensors),
        kept=tuple(_planned(tensor) for tensor in plan.tensors if tensor.action != Action.PACKED),
        tensors=tuple(map(_planned, plan.tensors)) if every_tensor else (),
        skipped=tuple(SkippedFile(side.name, side.size, side.rule) for side in prepared.side_files if side.rule),
        source_nbytes=plan.source_nbytes,
        output_nbytes=plan.output_nbytes,
        free_nbytes=free_space(prepared.output.parent),
        targets=plan.targets if isinstance(plan, PackPlan) else (),
        tp=plan.tp if isinstance(plan, PackPlan) else None,
        ep=plan.ep if isinstance(plan, PackPlan) else None,
        engines=_engines(plan),
        warnings=plan.warnings,
        notes=written.notes if written else (),
        dry_run=written is None,
        already_complete=written is not None and written.already_complete,
        root=written.root if written else None,
        seconds=written.seconds if written else None,
        resumed_nbytes=written.resumed_nbytes if written else 0,
        peak_memory=written.peak_memory if written else None,
        sqnr=written.sqnr if written else None,
        output_sqnr=written.output_sqnr if written else None,
        choice=prepared.choice,
    )


def _engines(plan: Plan) -> tuple[EngineVerdict, ...]:
    """Who loads an FP8 checkpoint; nothing is said of floats, which everybody loads."""
    return plan.engines if isinstance(plan, PackPlan) else ()


def _scheme(recipe: Recipe) -> SchemeChoice:
    return SchemeChoice(
        name=recipe.scheme,
        reason=recipe.reason,
        format=recipe.format.name,
        granularity=recipe.granularity.name,
        scale_rounding=recipe.scale_rounding.value,
        activations=recipe.activations,
        quant_method=recipe.quant_method,
        kv_cache=recipe.kv_cache,
        kept_dtype=recipe.kept_dtype,
        scales=recipe.scales,
        rounding=recipe.rounding,
    )


def _planned(tensor: TensorPlan) -> PlannedTensor:
    spec, packing = tensor.spec, tensor.packing
    about = (spec.name, tensor.action.value, tensor.role, tensor.reason, spec.dtype, spec.shape, spec.nbytes)
    if packing is None:
        return PlannedTensor(*about)
    return PlannedTensor(*about, packing.format.name, packing.granularity.name, packing.scale.name, packing.carried)
