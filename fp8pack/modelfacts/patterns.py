"""Patterns that name tensors: an exact name, a glob over the whole dotted name, or `re:` and a regular expression."""

import re
import shlex
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import translate
from glob import escape

from fp8pack.errors import RecipeError
from fp8pack.inputs import parse_texts
from fp8pack.limits import time_limit

_OPTIONS = ("ignore", "only", "pack")
_MAX_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Pattern:
    """A pattern as written; with a leading `?` it may match nothing."""

    text: str

    @property
    def optional(self) -> bool:
        """Whether it may match nothing."""
        return self.text.startswith("?")

    @property
    def exact(self) -> bool:
        """Whether it is a name, not a glob or a regular expression."""
        body = self.text.removeprefix("?")
        return not body.startswith("re:") and not set("*?[") & set(body)

    def compile(self) -> re.Pattern[str]:
        """Return a regular expression whose `match` accepts the names; `re:` is anchored at the start only."""
        body = self.text.removeprefix("?")
        if not body.startswith("re:"):
            return re.compile(re.escape(body) + r"\Z" if self.exact else translate(body))
        try:
            return re.compile(body[3:])
        except re.error as error:
            raise RecipeError(f"pattern {self.text!r} is not a valid regular expression: {error}") from None


Patterns = str | Pattern | Iterable[str | Pattern]


def ignoring(*names: str) -> str:
    """Return the options that leave tensors unquantized: an `--ignore` for each name, quoted for a shell."""
    return " ".join(f"--ignore {shlex.quote(escape(name))}" for name in names)


def ignoring_all(names: Iterable[str]) -> str:
    """Return the options that leave many tensors unquantized, by globs with `*` for their numbers."""
    globs = dict.fromkeys(star(name.removesuffix(".weight")) for name in names)
    return " ".join(f"--ignore {shlex.quote(glob)}" for glob in globs)


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
    """Finds the first of several patterns that matches a tensor, and remembers which ones matched any.

    option: what the patterns are for, as a keyword names it: `ignore`, `only`, …
    """

    def __init__(self, patterns: tuple[Pattern, ...], option: str) -> None:
        self._exact: dict[str, list[tuple[int, Pattern]]] = {}
        self._patterns: list[tuple[int, Pattern, re.Pattern[str]]] = []
        for rank, pattern in enumerate(patterns):
            if pattern.exact:  # looked up, since there may be as many as tensors
                self._exact.setdefault(pattern.text.removeprefix("?"), []).append((rank, pattern))
            else:
                self._patterns.append((rank, pattern, pattern.compile()))
        self._option = option
        self._seconds: dict[str, float] = {}
        self._unused = {pattern.text for pattern in patterns if not pattern.optional}
        self._asked: list[tuple[str, ...]] = []

    def find(self, *names: str) -> Pattern | None:
        """Return the first pattern that matches a tensor or its module; every pattern that matches counts as used.

        names: the tensor's own, and that of the fused tensor which it is a part of.
        """
        self._asked.append(names)
        candidates = _names_of(names)
        hits = [hit for candidate in candidates for hit in self._exact.get(candidate, ())]
        hits += [
            (rank, pattern) for rank, pattern, regex in self._patterns if self._matches(pattern, regex, candidates)
        ]
        self._unused.difference_update(hit.text for _, hit in hits)
        return min(hits, key=lambda hit: hit[0])[1] if hits else None

    def _matches(self, pattern: Pattern, regex: re.Pattern[str], names: Iterable[str]) -> bool:
        """Match within the time that is left for a pattern over all names: one expression can take years."""
        if not pattern.text.removeprefix("?").startswith("re:"):
            return any(map(regex.match, names))
        started, spent = time.perf_counter(), self._seconds.get(pattern.text, 0.0)
        try:
            with time_limit(max(1e-3, _MAX_SECONDS - spent)):
                return any(map(regex.match, names))
        except TimeoutError:
            raise RecipeError(
                f"{self._option} pattern {pattern.text!r} takes longer than {_MAX_SECONDS:.0f} s", "write a glob"
            ) from None
        finally:
            self._seconds[pattern.text] = spent + time.perf_counter() - started

    def check(self) -> None:
        """Raise RecipeError if a pattern matched no tensor, with the nearest one that does."""
        if not self._unused:
            return
        text = min(self._unused)
        sentence = f"{self._option} pattern {text!r} matches no tensor"
        guess = next(((near, count) for near in _nearest(text, self._asked) if (count := self._count(near))), None)
        if guess is None:
            raise RecipeError(sentence, f"check the name; {self._typed('?' + text)} also accepts no match")
        near, count = guess
        if text.startswith("re:"):
            raise RecipeError(f"{sentence}: re: must match from the start of the name", self._typed(near))
        tensors = "1 tensor" if count == 1 else f"{count} tensors"
        raise RecipeError(f"{sentence}: did you mean {near!r} ({tensors})?", self._typed(near))

    def _count(self, text: str) -> int:
        """How many of the tensors a pattern matches; 0 if it is no valid regular expression."""
        try:
            regex = Pattern(text).compile()
        except RecipeError:
            return 0
        return sum(any(map(regex.match, _names_of(names))) for names in self._asked)

    def _typed(self, text: str) -> str:
        return f"--{self._option} {shlex.quote(text)}" if self._option in _OPTIONS else f"write {text!r}"


def _names_of(names: tuple[str, ...]) -> set[str]:
    """The names that a pattern may match: those of a tensor and of its module."""
    return {candidate for name in names for candidate in (name, name.removesuffix(".weight"))}


def _nearest(text: str, asked: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Patterns that may have been meant, the narrowest first: anywhere in the name, then without a typing error."""
    if text.startswith("re:"):
        body = text[3:].removeprefix(".*")
        if re.fullmatch(r"[\w.-]+", body):  # a name: whole parts of it, so that layer 1 is not layer 10
            escaped = body.replace(".", r"\.")
            yield rf"re:.*{escaped}\..*"
            yield f"re:.*{escaped}$"
        yield f"re:.*({body})" if "|" in body else f"re:.*{body}"
        return
    if not text.startswith("*"):
        yield from (f"*.{text}", f"{text}.*", f"*.{text}.*", f"*{text}*")
    modules = {name.removesuffix(".weight") for names in asked for name in names}
    if not set("*?[") & set(text):
        yield from get_close_matches(text, modules, 1)
    parent, dot, leaf = text.rpartition(".")
    for near in get_close_matches(leaf, {module.rpartition(".")[2] for module in modules}, 1):
        yield f"{parent}{dot}{near}"
        if not parent:
            yield f"*.{near}"


def star(name: str) -> str:
    """Return a name with `*` for each number between its dots."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))
