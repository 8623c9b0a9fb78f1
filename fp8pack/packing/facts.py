"""What writing a checkpoint will do, or did, as plain data: what `--json` prints and the summary is drawn from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fp8pack.checkpoint.shard_writer import free_space
from fp8pack.packing.prepare import Prepared
from fp8pack.planning.plan import Action, PackPlan, Plan, TensorPlan


@dataclass(frozen=True, slots=True)
class WriteResult:
    """What a run did. SQNR is measured on the first 8 rows of every band; None where this run measured nothing."""

    output: Path
    root: str
    already_complete: bool
    seconds: float
    resumed_nbytes: int = 0
    sqnr_mean: float | None = None
    sqnr_worst: float | None = None
    sqnr_worst_tensor: str | None = None
    peak_memory: int = 0
    notes: tuple[str, ...] = ()


def write_facts(prepared: Prepared, result: WriteResult | None = None, *, every_tensor: bool = False) -> dict[str, Any]:
    """Return the facts of a pack, conversion or unpacking, without a result those of a dry run.

    every_tensor adds a list of all of them.
    """
    source, plan = prepared.source, prepared.plan
    facts: dict[str, Any] = {
        "schema": 1,
        "model": source.name,
        "source": str(source.path),
        "architecture": plan.facts.architecture,
        "source_dtypes": sorted({tensor.spec.dtype for tensor in plan.tensors}),
        "recipe": {**plan.selection, **plan.recipe_data},
        "num_tensors": len(plan.tensors),
        "num_packed": len(plan.packed),
        "num_carried": sum(tensor.packing is not None and tensor.packing.carried for tensor in plan.tensors),
        "num_unpacked": sum(tensor.action == Action.UNPACKED for tensor in plan.tensors),
        "kept": [_kept(tensor) for tensor in plan.tensors if tensor.action != Action.PACKED],
        "left_out": [
            {"file": side.name, "size": side.size, "rule": side.rule} for side in prepared.side_files if side.rule
        ],
        "source_nbytes": plan.source_nbytes,
        "output_nbytes": plan.output_nbytes,
        "free_nbytes": free_space(prepared.output.parent),
        "output": str(prepared.output),
        "engines": _engines(plan),
        "warnings": list(plan.warnings),
        "dry_run": result is None,
    }
    if every_tensor:
        facts["tensors"] = [_planned(tensor) for tensor in plan.tensors]
    if result is None:
        return facts
    return facts | {
        "already_complete": result.already_complete,
        "root": result.root,
        "seconds": result.seconds,
        "resumed_nbytes": result.resumed_nbytes,
        "peak_memory": result.peak_memory,
        "sqnr": {"mean": result.sqnr_mean, "worst": result.sqnr_worst, "worst_tensor": result.sqnr_worst_tensor},
        "notes": list(result.notes),
    }


def _engines(plan: Plan) -> list[dict[str, Any]]:
    """Who loads an FP8 checkpoint; nothing is said of floats, which everybody loads."""
    if not isinstance(plan, PackPlan):
        return []
    return [
        {"engine": v.engine, "tp": list(v.tp), "note": v.note, "reason": v.reason, "remedy": v.remedy}
        for v in plan.engines
    ]


def _kept(tensor: TensorPlan) -> dict[str, Any]:
    return {
        "name": tensor.spec.name,
        "action": tensor.action.value,
        "role": tensor.role,
        "reason": tensor.reason,
        "nbytes": tensor.spec.nbytes,
    }


def _planned(tensor: TensorPlan) -> dict[str, Any]:
    planned: dict[str, Any] = {
        "name": tensor.spec.name,
        "action": tensor.action.value,
        "role": tensor.role,
        "reason": tensor.reason,
        "dtype": tensor.spec.dtype,
        "shape": list(tensor.spec.shape),
    }
    if tensor.packing:
        planned |= {
            "format": tensor.packing.format.name,
            "granularity": tensor.packing.granularity.name,
            "scale": tensor.packing.scale.name,
            **({"carried": True} if tensor.packing.carried else {}),
        }
    return planned
