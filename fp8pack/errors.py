"""Every failure that fp8pack expects, each with the exit code that the command line returns for it.

Fp8PackError                1   a failure with a one-sentence reason
+-- RecipeError             2   flags, patterns or a recipe file that cannot be carried out
+-- InputError              3   a checkpoint that is refused: malformed, unsafe, or of a kind fp8pack does not take
+-- OutputError             4   the output exists, is locked, or holds an unfinished pack of another recipe
+-- SpaceError              5   no space left, or not writable
+-- VerificationError       6   bytes that differ from what the manifest says
+-- DeadlineError           7   `--deadline` was reached; the same command continues
+-- BoundError              8   a `--fail-if` bound is broken
+-- DeviceError             1   torch sees no such device here

A mistake of the programmer stays a ValueError or TypeError and keeps its traceback.
"""


class Fp8PackError(Exception):
    """An expected failure; `str(error)` is one sentence that names the file, the tensor and the remedy."""

    exit_code = 1

    def __init__(self, sentence: str, hint: str = "") -> None:
        super().__init__(sentence)
        self.hint = hint


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
    """A file does not hold what its manifest says."""

    exit_code = 6


class DeadlineError(Fp8PackError):
    """The time given by `--deadline` is used up; finished work is kept."""

    exit_code = 7


class BoundError(Fp8PackError):
    """A measured value breaks a bound given by `--fail-if`."""

    exit_code = 8


class DeviceError(Fp8PackError):
    """torch sees no device of this name or index."""

    exit_code = 1
