"""The result of `evaluate`."""

from dataclasses import dataclass
from pathlib import Path

from fp8pack.documents import Document, html_table
from fp8pack.evaluation.intervals import Interval


@dataclass(frozen=True, slots=True)
class WorstDocument:
    """A document, the mean KL divergence over it, and how many of its tokens were predicted."""

    name: str
    kl: float
    tokens: int


@dataclass(frozen=True, slots=True)
class WorstPosition:
    """A position: the text before it, the token that follows, the KL divergence, and both models' probability of it."""

    document: str
    position: int
    before: str
    following: str
    kl: float
    base_probability: float
    probability: float


@dataclass(frozen=True, slots=True)
class Quality:
    """What a checkpoint lost against its source, over all positions; in nats.

    ppl_ratio: perplexity over the source's. kl: of the source's next-token distribution and this one's; its mean,
    median, percentiles and largest. top1: share of positions with the same likeliest token; top5: mean share of the
    source's five likeliest tokens among its own five. probability_rms: of the token that follows, this minus the
    source's.
    """

    checkpoint: Path
    activations: str
    perplexity: Interval
    ppl_ratio: Interval
    kl: Interval
    kl_median: Interval
    kl_p90: Interval
    kl_p99: Interval
    kl_p999: Interval
    kl_max: float
    top1: Interval
    top5: Interval
    probability_rms: Interval
    worst_documents: tuple[WorstDocument, ...]
    worst_positions: tuple[WorstPosition, ...]


@dataclass(frozen=True, slots=True, repr=False)
class Evaluation(Document):
    """Checkpoints against the source that they were packed from, on the same text.

    num_tokens: that were predicted. max_length: tokens of a window. perplexity: of the source.
    """

    source: Path
    text: tuple[str, ...]
    num_documents: int
    num_tokens: int
    max_length: int
    dtype: str
    perplexity: Interval
    checkpoints: tuple[Quality, ...]
    notes: tuple[str, ...]
    seconds: float

    def _repr_html_(self) -> str:
        title = f"{self.source}: {self.num_tokens} tokens of {self.num_documents} documents"
        rows = [
            (str(found.checkpoint), f"{found.kl.value:.3g}", f"{found.ppl_ratio.value:.4f}", f"{found.top1.value:.2%}")
            for found in self.checkpoints
        ]
        return html_table(title, ("checkpoint", "KL", "perplexity ratio", "same top token"), rows)
