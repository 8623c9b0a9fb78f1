"""Which tensors of an inspection are shown, and in which order."""

from collections.abc import Callable
from typing import Final

from fp8pack.bounds import parse_bounds
from fp8pack.inputs import Texts, parse_choice
from fp8pack.modelfacts.patterns import Matcher, Patterns, parse_patterns
from fp8pack.numerics.metrics import WeightError
from fp8pack.reading.inspection import Inspection, ScaleRange, TensorInspection
from fp8pack.units import natural

Metric = Callable[[TensorInspection], float | None]


def _of_error(metric: Callable[[WeightError], float | None]) -> Metric:
    return lambda tensor: metric(tensor.error) if tensor.error else None


def _of_scale(metric: Callable[[ScaleRange], float | None]) -> Metric:
    return lambda tensor: metric(tensor.scale) if tensor.scale else None


METRICS: Final[dict[str, Metric]] = {
    "sqnr": lambda tensor: tensor.sqnr,
    "output_sqnr": lambda tensor: tensor.output_sqnr,
    "cosine": _of_error(lambda error: error.cosine),
    "relative_mean": _of_error(lambda error: error.relative_mean),
    "relative_max": _of_error(lambda error: error.relative_max),
    "flushed": _of_error(lambda error: error.flushed),
    "subnormal": _of_error(lambda error: error.subnormal),
    "saturated": _of_error(lambda error: error.saturated),
    "outlier_ratio": _of_error(lambda error: error.outlier_ratio),
    "scale_min": _of_scale(lambda scale: scale.min),
    "scale_max": _of_scale(lambda scale: scale.max),
    "scale_ratio": _of_scale(lambda scale: scale.spread),
    "amax": lambda tensor: tensor.amax,
    "size": lambda tensor: tensor.nbytes,
}
ORDERS = ("name", "sqnr", "scale", "size")


def check_selection(*, only: Patterns, where: Texts, sort: str) -> None:
    """Raise what `select` raises of its options, before anything is read."""
    parse_bounds(where, tuple(METRICS), "where")
    parse_choice("sort", sort, ORDERS)
    parse_patterns("only", only)


def select(
    found: Inspection, *, only: Patterns = (), where: Texts = (), sort: str = "name"
) -> tuple[TensorInspection, ...]:
    """Return tensors that match a pattern and for which every condition is true, in order.

    only: patterns, as those of `pack`. where: conditions such as "sqnr<30" or "flushed>=0.01"; a tensor without that
        number fails it. sort: name (layer 2 before layer 10), sqnr (worst first), scale or size (largest first).

    Raises:
        RecipeError: a pattern matches nothing, or a condition or the order is not known.
    """
    conditions = parse_bounds(where, tuple(METRICS), "where")
    order = parse_choice("sort", sort, ORDERS)
    tensors = sorted(found.tensors, key=lambda tensor: natural(tensor.name))
    if patterns := parse_patterns("only", only):
        matcher = Matcher(patterns, "only")
        tensors = [tensor for tensor in tensors if matcher.find(tensor.name)]
        matcher.check()
    for condition in conditions:
        metric = METRICS[condition.metric]
        values = [(tensor, metric(tensor)) for tensor in tensors]
        tensors = [tensor for tensor, value in values if value is not None and condition.is_broken_by(value)]
    match order:
        case "sqnr":
            tensors.sort(key=lambda tensor: (not tensor.problem, tensor.sqnr is None, tensor.sqnr or 0.0))
        case "scale":
            tensors.sort(key=lambda tensor: -(METRICS["scale_max"](tensor) or 0.0))
        case "size":
            tensors.sort(key=lambda tensor: -tensor.nbytes)
    return tuple(tensors)
