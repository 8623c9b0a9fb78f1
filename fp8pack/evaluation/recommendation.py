"""The result of `recommend`."""

from dataclasses import dataclass
from pathlib import Path

from fp8pack.documents import Document, html_table
from fp8pack.evaluation.intervals import Interval
from fp8pack.units import format_size


@dataclass(frozen=True, slots=True)
class SchemeOption:
    """A scheme for a model: what it would be, and what it cost.

    activations: how they are scaled. rounding: of weights. nbytes: of the output's tensors. kl, top1: measured against
    the source, None if it is not loaded. problem: why the targets do not load it, or why it cannot be packed; empty if
    nothing speaks against it.
    """

    scheme: str
    activations: str
    rounding: str
    nbytes: int | None
    kl: Interval | None
    top1: Interval | None
    problem: str


@dataclass(frozen=True, slots=True, repr=False)
class Recommendation(Document):
    """Which scheme to take for a model and its targets, why, and the command that packs it.

    options: the schemes that are loaded first, the least KL divergence first. num_tokens: that were predicted.
    """

    source: Path
    targets: tuple[str, ...]
    text: tuple[str, ...]
    num_tokens: int
    options: tuple[SchemeOption, ...]
    take: str
    why: str
    command: str
    notes: tuple[str, ...]
    seconds: float

    def _repr_html_(self) -> str:
        rows = [
            (
                f"{option.scheme} {option.rounding}",
                format_size(option.nbytes) if option.nbytes is not None else "",
                f"{option.kl.value:.3g}" if option.kl else option.problem,
            )
            for option in self.options
        ]
        return html_table(f"{self.source}: take {self.take}, {self.why}", ("scheme", "bytes", "KL"), rows)
