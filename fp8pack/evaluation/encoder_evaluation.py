"""The result of `evaluate_encoder`."""

from dataclasses import dataclass
from pathlib import Path

from fp8pack.documents import Document, html_table
from fp8pack.evaluation.intervals import Interval


@dataclass(frozen=True, slots=True)
class WorstText:
    """A text, and the cosine of its two embeddings, or the KL divergence of its two distributions over labels."""

    text: str
    value: float


@dataclass(frozen=True, slots=True)
class EncoderQuality:
    """What a checkpoint lost against its source, text by text.

    Of embeddings: cosine of each text's two embeddings, its mean and its smallest; rank_correlation (Spearman) of the
    similarities of all pairs of texts; neighbours: share of texts whose nearest other text is the same. Of a
    classifier: agreement: share of texts with the same label; kl: of the distributions over labels, in nats. The others
    are None.
    """

    checkpoint: Path
    activations: str
    cosine: Interval | None
    cosine_min: float | None
    rank_correlation: float | None
    neighbours: Interval | None
    agreement: Interval | None
    kl: Interval | None
    worst: tuple[WorstText, ...]


@dataclass(frozen=True, slots=True, repr=False)
class EncoderEvaluation(Document):
    """Checkpoints of an encoder against the source that they were packed from, on the same texts.

    kind: `embeddings` or `classes`. pooling: how an embedding is made of hidden states. num_texts: sentences or lines.
    """

    source: Path
    kind: str
    pooling: str
    text: tuple[str, ...]
    num_documents: int
    num_texts: int
    num_tokens: int
    dtype: str
    checkpoints: tuple[EncoderQuality, ...]
    notes: tuple[str, ...]
    seconds: float

    def _repr_html_(self) -> str:
        title = f"{self.source}: {self.num_texts} texts of {self.num_documents} documents"
        rows = [
            (str(found.checkpoint), *(f"{value:.6g}" for _, value in measures(found))) for found in self.checkpoints
        ]
        names = [name for name, _ in measures(self.checkpoints[0])] if self.checkpoints else []
        return html_table(title, ("checkpoint", *names), rows)


def measures(quality: EncoderQuality) -> list[tuple[str, float]]:
    """Return the names and values of what was measured."""
    intervals = {name: getattr(quality, name) for name in ("cosine", "neighbours", "agreement", "kl")}
    found = [(name, interval.value) for name, interval in intervals.items() if interval is not None]
    plain = (("cosine_min", quality.cosine_min), ("rank_correlation", quality.rank_correlation))
    return found + [(name, value) for name, value in plain if value is not None]
