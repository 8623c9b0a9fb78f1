"""Bounds on measured values, such as `sqnr_min<28`, that end a command with an exit code of its own."""

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from fp8pack.errors import RecipeError
from fp8pack.inputs import Texts, parse_texts

_SIGNS: Final[dict[str, Callable[[float, float], bool]]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


@dataclass(frozen=True, slots=True)
class Bound:
    """A bound: broken where `value sign bound` is true, as in `sqnr_min < 28`."""

    metric: str
    sign: str
    value: float

    def is_broken_by(self, value: float) -> bool:
        """Whether a value breaks it."""
        return _SIGNS[self.sign](value, self.value)

    @property
    def is_upper(self) -> bool:
        """Whether large values break it."""
        return self.sign.startswith(">")


def parse_bounds(texts: Texts, metrics: Sequence[str], name: str = "fail_if") -> tuple[Bound, ...]:
    """Return the bounds of texts such as `sqnr_min<28`; RecipeError if one is malformed, or of another metric."""
    return tuple(_parse_bound(text, metrics, name.replace("_", " ")) for text in parse_texts(name, texts))


def _parse_bound(text: str, metrics: Sequence[str], name: str) -> Bound:
    match = re.fullmatch(r"\s*(\w+)\s*([<>]=?)\s*(-?\d+(?:\.\d+)?(?:[eE]-?\d+)?)\s*", text)
    if match is None or match[1] not in metrics:
        known = f"{', '.join(metrics[:-1])} or {metrics[-1]}"
        raise RecipeError(f"{name} {text!r} is not a bound", f"write METRIC<VALUE, with {known}")
    return Bound(match[1], match[2], float(match[3]))
