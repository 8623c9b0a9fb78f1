"""The result of `evaluate_layers`."""

from dataclasses import dataclass
from pathlib import Path

from fp8pack.documents import Document, html_table
from fp8pack.evaluation.intervals import Interval


@dataclass(frozen=True, slots=True)
class PartCost:
    """What one layer or linear costs when it alone is in FP8: KL divergence in nats, agreement of the top token.

    tensors: its weights that are in FP8, by their names in the checkpoint. num_elements: of these.
    """

    name: str
    kl: Interval
    top1: Interval
    tensors: tuple[str, ...] = ()
    num_elements: int = 0


@dataclass(frozen=True, slots=True)
class LinearCost:
    """The SQNR in dB of a linear's output in FP8, given the inputs that it has in the source; None for a NaN."""

    name: str
    sqnr: float | None


@dataclass(frozen=True, slots=True, repr=False)
class LayerEvaluation(Document):
    """A checkpoint against its source, one layer or linear at a time.

    parts: what each costs alone, in order; by: `layer` or `linear`. linears: the SQNR of every FP8 linear's output,
    over the first `num_linear_tokens` tokens. num_tokens: that were predicted. perplexity, fingerprint: of the source.
    """

    source: Path
    checkpoint: Path
    activations: str
    text: tuple[str, ...]
    num_documents: int
    num_tokens: int
    num_linear_tokens: int
    dtype: str
    by: str
    perplexity: Interval
    parts: tuple[PartCost, ...]
    linears: tuple[LinearCost, ...]
    notes: tuple[str, ...]
    seconds: float
    fingerprint: str = ""

    @property
    def worst(self) -> tuple[PartCost, ...]:
        """The parts, the most expensive first."""
        return tuple(sorted(self.parts, key=lambda part: -part.kl.value))

    def _repr_html_(self) -> str:
        rows = [(part.name, f"{part.kl.value:.3g}", f"{part.top1.value:.2%}") for part in self.parts]
        return html_table(f"{self.checkpoint}, one {self.by} at a time", ("in FP8", "KL", "same top token"), rows)
