"""Bounds on measured values, such as `sqnr_min<28`, that end a command with an exit code of its own."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from fp8pack.errors import RecipeError
from fp8pack.inputs import Texts, parse_texts


@dataclass(frozen=True, slots=True)
class Bound:
    """A bound: broken when the metric is below (`<`) or above (`>`) the value."""

    metric: str
    sign: str
    value: float

    def is_broken_by(self, value: float) -> bool:
        """Whether a value breaks it."""
        return value < self.value if self.sign == "<" else value > self.value


def parse_bounds(texts: Texts, metrics: Sequence[str]) -> tuple[Bound, ...]:
    """Return the bounds of texts such as `sqnr_min<28`; RecipeError if one is malformed, or of another metric."""
    return tuple(_parse_bound(text, metrics) for text in parse_texts("fail_if", texts))


def _parse_bound(text: str, metrics: Sequence[str]) -> Bound:
    match = re.fullmatch(r"\s*(\w+)\s*([<>])\s*(-?\d+(?:\.\d+)?(?:[eE]-?\d+)?)\s*", text)
    if match is None or match[1] not in metrics:
        known = f"{', '.join(metrics[:-1])} or {metrics[-1]}"
        raise RecipeError(f"fail if {text!r} is not a bound", f"write METRIC<VALUE, with {known}")
    return Bound(match[1], match[2], float(match[3]))
