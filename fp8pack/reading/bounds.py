"""Bounds on measured values, such as `sqnr_min<28`, that end a command with an exit code of its own."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from fp8pack.engines.known import NAMES
from fp8pack.errors import BoundError, RecipeError
from fp8pack.inputs import Texts, parse_texts
from fp8pack.reading.comparison import Comparison
from fp8pack.reading.inspection import Inspection

METRICS = ("sqnr_min", "sqnr_mean")


@dataclass(frozen=True, slots=True)
class Bound:
    """A bound: broken when the metric is below (`<`) or above (`>`) the value."""

    metric: str
    sign: str
    value: float


def parse_bounds(texts: Texts) -> tuple[Bound, ...]:
    """Return the bounds of texts such as `sqnr_min<28`; RecipeError if one is malformed."""
    return tuple(map(_parse_bound, parse_texts("fail_if", texts)))


def _parse_bound(text: str) -> Bound:
    match = re.fullmatch(r"\s*(\w+)\s*([<>])\s*(-?\d+(?:\.\d+)?)\s*", text)
    if match is None or match[1] not in METRICS:
        raise RecipeError(f"fail if {text!r} is not a bound", f"write METRIC<VALUE, with {' or '.join(METRICS)}")
    return Bound(match[1], match[2], float(match[3]))


def check_bounds(found: Inspection | Comparison, bounds: Sequence[Bound]) -> None:
    """Raise BoundError for the first bound that is broken; RecipeError if its metric was not measured."""
    for bound in bounds:
        totals = found.totals
        value = totals.sqnr_min if bound.metric == "sqnr_min" else totals.sqnr_mean
        if value is None:
            if isinstance(found, Comparison) and found.totals.num_equal == found.totals.num_tensors:
                continue  # nothing differs
            raise RecipeError(f"{bound.metric} was not measured", "--against SOURCE measures it")
        if value < bound.value if bound.sign == "<" else value > bound.value:
            raise BoundError(f"{bound.metric} is {value:.2f}, which is {bound.sign} {bound.value:g}")


def check_targets(inspection: Inspection, targets: Sequence[str]) -> None:
    """Raise BoundError for the first of these engines that does not load the checkpoint."""
    for verdict in inspection.engines:
        if verdict.engine in targets and not verdict.loads:
            what = "does not load this checkpoint" if verdict.loads is False else "may not load this checkpoint"
            raise BoundError(f"{NAMES[verdict.engine]} {what}: {verdict.reason}", verdict.remedy)
