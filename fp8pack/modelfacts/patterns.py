"""Patterns that name tensors: an exact name, a glob over the whole dotted name, or `re:` and a regular expression."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import translate

from fp8pack.errors import RecipeError
from fp8pack.inputs import parse_texts


@dataclass(frozen=True, slots=True)
class Pattern:
    """A pattern as written; `?` before it allows that it matches nothing."""

    text: str

    @property
    def optional(self) -> bool:
        """Whether it may match nothing."""
        return self.text.startswith("?")

    @property
    def exact(self) -> bool:
        """Whether it is a name, and not a glob or an expression."""
        body = self.text.removeprefix("?")
        return not body.startswith("re:") and not set("*?[") & set(body)

    def compile(self) -> re.Pattern[str]:
        """Return an expression whose `match` accepts the names it means; `re:` is anchored at the start only."""
        body = self.text.removeprefix("?")
        if not body.startswith("re:"):
            return re.compile(re.escape(body) + r"\Z" if self.exact else translate(body))
        try:
            return re.compile(body[3:])
        except re.error as error:
            raise RecipeError(f"pattern {self.text!r} is not a valid regular expression: {error}") from None


Patterns = str | Pattern | Iterable[str | Pattern]


def parse_patterns(name: str, value: Patterns) -> tuple[Pattern, ...]:
    """Return patterns from one or several, as text or as patterns; RecipeError if one is not a valid expression."""
    values = [value] if isinstance(value, str | Pattern) else value
    if isinstance(values, Iterable):
        values = [one.text if isinstance(one, Pattern) else one for one in values]
    patterns = tuple(map(Pattern, parse_texts(name, values)))
    for pattern in patterns:
        pattern.compile()
    return patterns


class Matcher:
    """Finds the first of several patterns that means a tensor, and remembers which ones meant any."""

    def __init__(self, patterns: tuple[Pattern, ...], flag: str) -> None:
        self._exact: dict[str, list[tuple[int, Pattern]]] = {}
        self._patterns: list[tuple[int, Pattern, re.Pattern[str]]] = []
        for rank, pattern in enumerate(patterns):
            if pattern.exact:  # looked up, since there may be as many as tensors
                self._exact.setdefault(pattern.text.removeprefix("?"), []).append((rank, pattern))
            else:
                self._patterns.append((rank, pattern, pattern.compile()))
        self._flag = flag
        self._unused = {pattern.text for pattern in patterns if not pattern.optional}

    def find(self, *names: str) -> Pattern | None:
        """Return the first pattern that means a tensor or its module; every pattern that does counts as used.

        names: the tensor's own, and that of the fused tensor which it is a part of.
        """
        candidates = {candidate for name in names for candidate in (name, name.removesuffix(".weight"))}
        hits = [hit for candidate in candidates for hit in self._exact.get(candidate, ())]
        hits += [(rank, pattern) for rank, pattern, regex in self._patterns if any(map(regex.match, candidates))]
        self._unused.difference_update(hit.text for _, hit in hits)
        return min(hits, key=lambda hit: hit[0])[1] if hits else None

    def check(self) -> None:
        """Raise RecipeError if a pattern meant no tensor."""
        if self._unused:
            text = min(self._unused)
            raise RecipeError(
                f"{self._flag} {text!r} matches no tensor: check the name, or write '?{text}' to allow that"
            )
