"""Every failure that fp8pack expects, each with the exit code that the command line returns for it.

Fp8PackError                1   a failure with a one-sentence reason
+-- RecipeError             2   options, patterns or a recipe file that cannot be used
+-- InputError              3   a checkpoint that is refused: malformed, unsafe, or of a kind fp8pack does not read
+-- OutputError             4   the output exists, is locked, or has an unfinished pack of another recipe
+-- SpaceError              5   no space left, or not writable
+-- VerificationError       6   bytes that differ from those in the manifest
+-- DeadlineError           7   the deadline was reached; the same command continues
+-- BoundError              8   a `--fail-if` condition such as `sqnr_min<28` is true
+-- DeviceError             1   torch finds no such device, or the system is not supported

A programming mistake is a ValueError or TypeError with its traceback.
"""

import re
from collections.abc import Iterable
from difflib import get_close_matches


class Fp8PackError(Exception):
    """An expected failure: `str(error)` is one sentence that names the file and the tensor, `hint` is the remedy.

    The sentence names no option. `command_hint` has options of the command line, as typed in a shell; `hint` has them
    as keywords of the Python functions. Both are empty if there is no remedy.
    """

    exit_code = 1

    def __init__(self, sentence: str, hint: str = "") -> None:
        super().__init__(sentence)
        self.command_hint = hint

    def __str__(self) -> str:
        return as_names(str(self.args[0]))

    @property
    def hint(self) -> str:
        """The remedy, in keywords of the Python functions; empty if there is none."""
        return as_keywords(self.command_hint)

    @property
    def command_line(self) -> str:
        """The sentence and the remedy, in options of the command line."""
        sentence = str(self.args[0])
        if not self.command_hint:
            return sentence
        return f"{sentence} {self.command_hint}" if sentence.endswith("?") else f"{sentence}: {self.command_hint}"

    def within(self, place: str) -> "Fp8PackError":
        """Return the same error, with a place before its sentence."""
        return type(self)(f"{place}: {self.args[0]}", self.command_hint)


class RecipeError(Fp8PackError):
    """The request contradicts itself, matches nothing, or asks for what a quant method cannot store."""

    exit_code = 2


class InputError(Fp8PackError):
    """The checkpoint is malformed, unsafe, or of a kind that is refused."""

    exit_code = 3


class OutputError(Fp8PackError):
    """The output exists, is in use, or has an unfinished pack of another recipe."""

    exit_code = 4


class SpaceError(Fp8PackError):
    """The output cannot be written: no space, no permission, a read-only file system."""

    exit_code = 5


class VerificationError(Fp8PackError):
    """The bytes of a file differ from those in its manifest."""

    exit_code = 6


class DeadlineError(Fp8PackError):
    """The deadline is reached; the same command continues."""

    exit_code = 7


class BoundError(Fp8PackError):
    """A `--fail-if` condition is true."""

    exit_code = 8


class DeviceError(Fp8PackError):
    """torch finds no such device, or fp8pack does not run on this system."""


class NoSuchName(KeyError):
    """A KeyError that names the nearest ones; they are looked for only when it is shown, since `get` raises many."""

    def __init__(self, name: str, names: Iterable[str]) -> None:
        super().__init__(name)
        self._names = names

    def __str__(self) -> str:
        near = get_close_matches(self.args[0], list(self._names), 3)
        return f"no {self.args[0]!r}" + (f": did you mean {' or '.join(map(repr, near))}?" if near else "")


_OPTION = re.compile(r"(?<![\w-])--(?P<no>no-)?(?P<name>[a-z][a-z-]*)(?:[ =](?P<value>'[^']*'|[^\s,:;)`]+))?")
_OPTION_NAME = re.compile(r"(?<![\w-])--(?P<no>no-)?(?P<name>[a-z][a-z-]*)")
_SWITCHES = (
    *("resume", "overwrite", "kv_cache", "all_experts", "until_converged", "trust_remote_code", "dry_run"),
    "strict_target",
)


def as_names(sentence: str) -> str:
    """Return a sentence with options by their names in Python: `--scale-rounding` is `scale_rounding`."""
    named = _OPTION_NAME.sub(
        lambda match: match["name"].replace("-", "_") + ("=False" if match["no"] else ""), sentence
    )
    return re.sub(r"(?<![\w-])-o(?![\w-])", "output", named)


def as_keywords(hint: str) -> str:
    """Return a hint with options of the command line as keywords: `--ignore x` as `ignore='x'`."""

    def keyword(match: re.Match[str]) -> str:
        name, value = match["name"].replace("-", "_"), match["value"]
        if match["no"] or name in _SWITCHES:
            return f"{name}={not match['no']}{' ' + value if value else ''}"
        if value is None:
            return name
        if value.startswith("'"):
            return f"{name}={'r' if chr(92) in value else ''}{value}"
        return f"{name}={value if value.isdecimal() else repr(value)}"

    return _OPTION.sub(keyword, re.sub(r"(?<![\w-])-o(?![\w-])", "--output", hint))
