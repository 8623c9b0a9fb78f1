"""Bounds on measured values, such as `sqnr_min<28`, that end a command with an exit code of its own."""

from collections.abc import Sequence

from fp8pack import bounds
from fp8pack.bounds import Bound
from fp8pack.engines.known import NAMES
from fp8pack.errors import BoundError, RecipeError
from fp8pack.inputs import Texts
from fp8pack.reading.comparison import Comparison
from fp8pack.reading.inspection import Inspection

METRICS = ("sqnr_min", "sqnr_mean")


def parse_bounds(texts: Texts) -> tuple[Bound, ...]:
    """Return the bounds of texts such as `sqnr_min<28`; RecipeError if one is malformed."""
    return bounds.parse_bounds(texts, METRICS)


def check_bounds(found: Inspection | Comparison, asked: Sequence[Bound]) -> None:
    """Raise BoundError for the first bound that is broken; RecipeError if its metric was not measured."""
    for bound in asked:
        totals = found.totals
        value = totals.sqnr_min if bound.metric == "sqnr_min" else totals.sqnr_mean
        if value is None:
            if isinstance(found, Comparison) and found.totals.num_equal == found.totals.num_tensors:
                continue  # nothing differs
            raise RecipeError(f"{bound.metric} was not measured", "--against SOURCE measures it")
        if bound.is_broken_by(value):
            raise BoundError(f"{bound.metric} is {value:.2f}, which is {bound.sign} {bound.value:g}")


def check_targets(inspection: Inspection, targets: Sequence[str]) -> None:
    """Raise BoundError for the first of these engines that does not load the checkpoint."""
    for verdict in inspection.engines:
        if verdict.engine in targets and not verdict.loads:
            what = "does not load this checkpoint" if verdict.loads is False else "may not load this checkpoint"
            raise BoundError(f"{NAMES[verdict.engine]} {what}: {verdict.reason}", verdict.remedy)
