"""Every failure that fp8pack expects, each with the exit code that the command line returns for it.

Fp8PackError                1   a failure with a one-sentence reason
+-- RecipeError             2   options, patterns or a recipe file that cannot be carried out
+-- InputError              3   a checkpoint that is refused: malformed, unsafe, or of a kind fp8pack does not take
+-- OutputError             4   the output exists, is locked, or holds an unfinished pack of another recipe
+-- SpaceError              5   no space left, or not writable
+-- VerificationError       6   bytes that differ from what the manifest says
+-- DeadlineError           7   the deadline was reached; the same command continues
+-- BoundError              8   a bound such as `sqnr_min<28` is broken
+-- DeviceError             1   torch sees no such device, or the system is not supported

A mistake of the programmer stays a ValueError or TypeError and keeps its traceback.
"""

import re


class Fp8PackError(Exception):
    """An expected failure: `str(error)` is one sentence that names the file and the tensor, `hint` is the way out.

    Both are written with the options of the command line. Here they are the keywords of the Python functions;
    `command_line` has them as they are typed in a shell.
    """

    exit_code = 1

    def __init__(self, sentence: str, hint: str = "") -> None:
        super().__init__(sentence)
        self._hint = hint

    def __str__(self) -> str:
        return as_names(str(self.args[0]))

    @property
    def hint(self) -> str:
        """The way out, in keywords of the Python functions; empty if there is none."""
        return as_keywords(self._hint)

    @property
    def command_line(self) -> str:
        """The sentence and the way out, in options of the command line."""
        sentence = str(self.args[0])
        if not self._hint:
            return sentence
        return f"{sentence} {self._hint}" if sentence.endswith("?") else f"{sentence}: {self._hint}"

    def within(self, place: str) -> "Fp8PackError":
        """Return the same error, whose sentence names a place first."""
        return type(self)(f"{place}: {self.args[0]}", self._hint)


class RecipeError(Fp8PackError):
    """The request contradicts itself, names nothing, or asks for what a convention cannot express."""

    exit_code = 2


class InputError(Fp8PackError):
    """The checkpoint is malformed, unsafe, or of a kind that is refused."""

    exit_code = 3


class OutputError(Fp8PackError):
    """The output exists, is in use, or holds an unfinished pack of another recipe."""

    exit_code = 4


class SpaceError(Fp8PackError):
    """The output cannot be written: no space, no permission, a read-only file system."""

    exit_code = 5


class VerificationError(Fp8PackError):
    """The bytes of a file differ from what its manifest says."""

    exit_code = 6


class DeadlineError(Fp8PackError):
    """The deadline is reached; finished work is kept."""

    exit_code = 7


class BoundError(Fp8PackError):
    """A measured value breaks a bound."""

    exit_code = 8


class DeviceError(Fp8PackError):
    """torch sees no such device here, or fp8pack does not run on this system."""


_OPTION = re.compile(r"(?<![\w-])--(?P<no>no-)?(?P<name>[a-z][a-z-]*)(?:[ =](?P<value>'[^']*'|[^\s,:;)`]+))?")
_OPTION_NAME = re.compile(r"(?<![\w-])--(?P<no>no-)?(?P<name>[a-z][a-z-]*)")
_SWITCHES = ("resume", "overwrite", "kv_cache", "all_experts", "until_converged", "trust_remote_code", "dry_run")


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
        return f"{name}={value if value.startswith(chr(39)) or value.isdecimal() else repr(value)}"

    return _OPTION.sub(keyword, re.sub(r"(?<![\w-])-o(?![\w-])", "--output", hint))
