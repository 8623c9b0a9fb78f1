"""Bounds on what `inspect` and `diff` measure, such as `sqnr_min<28`."""

from collections.abc import Sequence

from fp8pack.bounds import Bound
from fp8pack.engines.known import NAMES
from fp8pack.errors import BoundError, RecipeError
from fp8pack.reading.comparison import Comparison
from fp8pack.reading.inspection import Inspection

INSPECTION_METRICS = ("sqnr_min", "sqnr_mean", "cosine_min", "output_sqnr_min", "scale_ratio", "nan")
COMPARISON_METRICS = ("sqnr_min", "sqnr_mean", "scale_ratio", "nan")

Measured = tuple[float | None, str]  # a value, None if it was not measured, and the tensor that has it


def check_bounds(found: Inspection | Comparison, asked: Sequence[Bound]) -> None:
    """Raise BoundError for the first bound that is broken; RecipeError if its metric was not measured."""
    for bound in asked:
        if isinstance(found, Inspection):
            value, tensor = _of_inspection(found, bound.metric)
        else:
            value, tensor = _of_comparison(found, bound.metric)
            if value is None and found.totals.num_equal == found.totals.num_tensors:
                continue  # nothing differs
        if value is None:
            needs = " --calibration FILE" if bound.metric.startswith("output") else ""
            raise RecipeError(f"{bound.metric} was not measured", f"--against SOURCE{needs} measures it")
        if bound.is_broken_by(value):
            digits = ".2f" if bound.metric.startswith("sqnr") else ".6g"
            where = f" in {tensor}" if tensor else ""
            raise BoundError(f"{bound.metric} is {value:{digits}}{where}, which is {bound.sign} {bound.value:g}")


def check_targets(inspection: Inspection, targets: Sequence[str]) -> None:
    """Raise BoundError for the first of these engines that does not load the checkpoint."""
    for verdict in inspection.engines:
        if verdict.engine in targets and not verdict.loads:
            what = "does not load this checkpoint" if verdict.loads is False else "may not load this checkpoint"
            raise BoundError(f"{NAMES[verdict.engine]} {what}: {verdict.reason}", verdict.remedy)


def _of_inspection(found: Inspection, metric: str) -> Measured:
    totals = found.totals
    match metric:
        case "sqnr_min":
            return totals.sqnr_min, totals.sqnr_worst_tensor or ""
        case "sqnr_mean":
            return totals.sqnr_mean, totals.sqnr_worst_tensor or ""
        case "cosine_min":
            errors = ((tensor.error.cosine, tensor.name) for tensor in found.tensors if tensor.error)
            cosines = [(cosine, name) for cosine, name in errors if cosine is not None]
            return min(cosines) if cosines and not totals.num_spoiled else (None, "")
        case "output_sqnr_min":
            outputs = [(tensor.output_sqnr, tensor.name) for tensor in found.tensors if tensor.output_sqnr is not None]
            return min(outputs) if outputs and not totals.num_spoiled else (None, "")
        case "scale_ratio":  # the largest scale of a weight over its smallest
            spreads = ((tensor.scale.spread, tensor.name) for tensor in found.tensors if tensor.scale)
            return max(((spread, name) for spread, name in spreads if spread is not None), default=(1.0, ""))
        case _:
            return totals.num_spoiled, next((tensor.name for tensor in found.tensors if tensor.problem), "")


def _of_comparison(found: Comparison, metric: str) -> Measured:
    totals = found.totals
    match metric:
        case "sqnr_min":
            return totals.sqnr_min, totals.sqnr_worst_tensor or ""
        case "sqnr_mean":
            return totals.sqnr_mean, totals.sqnr_worst_tensor or ""
        case "scale_ratio":  # how far a scale of B is from A's, in either direction
            ratios = ((tensor.scale_ratio, tensor.name) for tensor in found.tensors)
            apart = [(max(high, 1 / low), name) for (low, high), name in ((r, n) for r, n in ratios if r) if low > 0]
            return max(apart, default=(1.0, ""))
        case _:
            spoiled = [tensor.name for tensor in found.tensors if tensor.num_nonfinite]
            return len(spoiled), spoiled[0] if spoiled else ""
