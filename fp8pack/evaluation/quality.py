"""From what was measured at every position to what is said of a checkpoint."""

from pathlib import Path

import numpy as np

from fp8pack.evaluation.divergence import Positions
from fp8pack.evaluation.evaluation import Quality, WorstDocument, WorstPosition
from fp8pack.evaluation.intervals import Bootstrap
from fp8pack.evaluation.text import Text

_WORST = 10
_SHOWN = 40  # characters of text before a position


def quality_of(path: Path, activations: str, parts: list[Positions], text: Text, bootstrap: Bootstrap) -> Quality:
    """Return the quality of a checkpoint; parts: what was measured in each window of the text."""
    found = Positions.joined(parts)
    return Quality(
        checkpoint=path,
        activations=activations,
        perplexity=bootstrap.mean(found.loss, np.exp),
        ppl_ratio=bootstrap.mean(found.loss - found.base_loss, np.exp),
        kl=bootstrap.mean(found.kl),
        kl_median=bootstrap.percentile(found.kl, 50),
        kl_p90=bootstrap.percentile(found.kl, 90),
        kl_p99=bootstrap.percentile(found.kl, 99),
        kl_p999=bootstrap.percentile(found.kl, 99.9),
        kl_max=float(found.kl.max()),
        top1=bootstrap.mean(found.top1),
        top5=bootstrap.mean(found.top5),
        probability_rms=bootstrap.mean(found.probability**2, np.sqrt),
        worst_documents=tuple(_worst_documents(parts, text)),
        worst_positions=tuple(_worst_positions(parts, text)),
    )


def _worst_documents(parts: list[Positions], text: Text) -> list[WorstDocument]:
    by_document: dict[int, list[Positions]] = {}
    for window, part in zip(text.windows, parts, strict=True):
        by_document.setdefault(window.document, []).append(part)
    joined = {document: Positions.joined(found).kl for document, found in by_document.items()}
    found = [WorstDocument(text.names[document], float(kl.mean()), kl.size) for document, kl in joined.items()]
    return sorted(found, key=lambda document: -document.kl)[:_WORST]


def _worst_positions(parts: list[Positions], text: Text) -> list[WorstPosition]:
    places = [(float(kl), i, j) for i, part in enumerate(parts) for j, kl in enumerate(part.kl)]
    found = []
    for kl, i, j in sorted(places, key=lambda place: -place[0])[:_WORST]:
        window, part = text.windows[i], parts[i]
        found.append(
            WorstPosition(
                document=text.names[window.document],
                position=window.begin + j + 1,
                before=text.tokenizer.decode(window.ids[: j + 1].tolist())[-_SHOWN:],
                following=text.tokenizer.decode([int(window.ids[j + 1])]),
                kl=kl,
                base_probability=float(np.exp(-part.base_loss[j])),
                probability=float(np.exp(-part.loss[j])),
            )
        )
    return found
