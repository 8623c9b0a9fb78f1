"""The result of `verify`."""

from dataclasses import dataclass
from pathlib import Path

from fp8pack.checkpoint.whole import Difference
from fp8pack.documents import Document, html_table
from fp8pack.errors import VerificationError


@dataclass(frozen=True, slots=True, repr=False)
class Verification(Document):
    """What was verified of a checkpoint, and what differs from what was packed.

    root: of the manifest, None without one. num_files: that were compared. num_tensors: whose bytes were digested, of
    all_tensors. nbytes: that were read. other_files: that the manifest does not name. unknown: what cannot be known of
    this checkpoint. repaired: what differed before a repair, and does not now.
    """

    checkpoint: Path
    root: str | None
    num_files: int
    num_tensors: int
    all_tensors: int
    nbytes: int
    differences: tuple[Difference, ...]
    other_files: tuple[str, ...]
    unknown: tuple[str, ...]
    seconds: float
    repaired: tuple[Difference, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing differs."""
        return not self.differences

    def check(self) -> None:
        """Raise VerificationError if something differs."""
        if not self.ok:
            count = len(self.differences)
            sentence = f"{self.checkpoint} has {count} differences, the first in {self.differences[0]}"
            if count == 1:
                sentence = str(self.differences[0])
            raise VerificationError(sentence, "copy the files again from where they were packed")

    def _repr_html_(self) -> str:
        title = f"{self.checkpoint}: {len(self.differences)} differences; {self.num_tensors} tensors verified"
        rows = [(entry.file, entry.tensor or "", entry.problem) for entry in self.differences]
        return html_table(title, ("file", "tensor", "what"), rows)
