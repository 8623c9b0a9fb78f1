"""The page of `eval --html`."""

from fp8pack.evaluation.evaluation import Evaluation, Quality
from fp8pack.evaluation.intervals import Interval
from fp8pack.report.page.document import document
from fp8pack.report.page.parts import bars, facts, figure, paragraph, section, table, text
from fp8pack.report.sentences import labels_of, spread, verdict_of_evaluation
from fp8pack.units import format_seconds

METRICS = (
    ("KL mean", "kl", ".3g"),
    ("KL median", "kl_median", ".3g"),
    ("KL 99 %", "kl_p99", ".3g"),
    ("KL 99.9 %", "kl_p999", ".3g"),
    ("perplexity", "perplexity", ".4g"),
    ("perplexity / source", "ppl_ratio", ".5f"),
    ("same top token", "top1", ".2%"),
    ("same top five", "top5", ".2%"),
    ("probability, RMS change", "probability_rms", ".3g"),
)
_WIDTH, _LEFT, _ROW = 640, 180, 24


def evaluation_page(found: Evaluation, command: str = "") -> str:
    """Return an evaluation as a page."""
    run = f"{found.num_documents} documents, {found.num_tokens} tokens predicted, windows of {found.max_length}"
    perplexity = spread(found.perplexity, ".4g")
    sections = [
        *(paragraph(said, "lead") for said in verdict_of_evaluation(found)),
        facts(
            [
                ("source", f"{found.source}, {found.dtype}, perplexity {perplexity}"),
                ("text", ", ".join(found.text)),
                ("run", f"{run}; {format_seconds(found.seconds)}"),
            ]
        ),
        *(paragraph(f"Note: {note}", "note") for note in found.notes),
        section("KL divergence", _intervals(found)),
        section("All measures", metric_table(found)),
        *(_details(label, quality) for label, quality in zip(labels_of(found), found.checkpoints, strict=True)),
    ]
    return document(f"{found.source.name or found.source}: what FP8 cost", sections, command)


def metric_table(found: Evaluation) -> str:
    """Return every measure of every checkpoint."""
    rows = []
    for name, field, how in METRICS:
        intervals: list[Interval] = [getattr(quality, field) for quality in found.checkpoints]
        rows.append((name, *(spread(interval, how) for interval in intervals)))
    rows.append(("KL largest", *(f"{quality.kl_max:.3g}" for quality in found.checkpoints)))
    rows.append(("activations", *(quality.activations for quality in found.checkpoints)))
    headers = ("", *labels_of(found))
    return table("Values, and 95 % intervals over documents", headers, rows, numbers=range(1, len(headers)))


def _intervals(found: Evaluation) -> str:
    """Mean KL of each checkpoint as a point with its interval."""
    most = max(quality.kl.high for quality in found.checkpoints) or 1.0
    room = _WIDTH - _LEFT - 90
    lines = []
    for i, (label, quality) in enumerate(zip(labels_of(found), found.checkpoints, strict=True)):
        y, kl = i * _ROW + 14, quality.kl
        low, at, high = (_LEFT + room * value / most for value in (kl.low, kl.value, kl.high))
        lines.append(
            f'<text x="{_LEFT - 10}" y="{y + 4}" text-anchor="end">{text(label[-28:])}</text>'
            f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}"/>'
            f'<rect x="{at - 3:.1f}" y="{y - 5}" width="6" height="10"/>'
            f'<text x="{high + 8:.1f}" y="{y + 4}">{kl.value:.3g}</text>'
        )
    said = "; ".join(
        f"{label}: {spread(q.kl, '.3g')}" for label, q in zip(labels_of(found), found.checkpoints, strict=True)
    )
    height = len(lines) * _ROW + 8
    axis = f'<line class="axis" x1="{_LEFT}" x2="{_LEFT}" y1="0" y2="{height}"/>'
    caption = "Mean KL divergence in nats, with 95 % intervals; 0 is the source"
    return figure(caption, (_WIDTH, height), said, axis + "".join(lines))


def _details(label: str, quality: Quality) -> str:
    percentiles = [
        (name, interval.value, f"{interval.value:.3g}")
        for name, interval in (
            ("median", quality.kl_median),
            ("mean", quality.kl),
            ("90 %", quality.kl_p90),
            ("99 %", quality.kl_p99),
            ("99.9 %", quality.kl_p999),
        )
    ]
    documents = [(document.name, f"{document.kl:.3g}", str(document.tokens)) for document in quality.worst_documents]
    positions = [
        (
            *(f"{place.kl:.3g}", place.document, place.before[-32:], repr(place.following)),
            f"{place.base_probability:.1%}",
            f"{place.probability:.1%}",
        )
        for place in quality.worst_positions
    ]
    return section(
        label,
        bars("KL divergence: how it is spread over positions", percentiles),
        table("Worst documents", ("document", "mean KL", "tokens"), documents, numbers=(1, 2)),
        table(
            "Worst positions",
            ("KL", "document", "before", "what follows", "in the source", "here"),
            positions,
            numbers=(0, 4, 5),
        ),
    )
