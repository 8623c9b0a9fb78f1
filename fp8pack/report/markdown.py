"""Results as Markdown, for a pull request or a model card."""

from collections.abc import Sequence

from fp8pack.documents import Document
from fp8pack.engines.known import NAMES
from fp8pack.evaluation.encoder_evaluation import EncoderEvaluation
from fp8pack.evaluation.evaluation import Evaluation, Quality
from fp8pack.evaluation.intervals import Interval
from fp8pack.evaluation.layer_evaluation import LayerEvaluation
from fp8pack.planning.calibration_summary import CalibrationSummary
from fp8pack.reading.groups import groups_of, worst_of
from fp8pack.reading.inspection import Inspection
from fp8pack.report.evaluation import encoder_rows
from fp8pack.report.page.evaluation import METRICS
from fp8pack.report.quality import decibels
from fp8pack.report.sentences import (
    labels_of,
    spread,
    verdict_of_calibration,
    verdict_of_evaluation,
    verdict_of_inspection,
    verdict_of_layers,
)
from fp8pack.report.text import printable
from fp8pack.units import format_size


def markdown_report(found: Document) -> str:
    """Return an inspection, an evaluation or the summary of a calibration as Markdown."""
    if isinstance(found, Inspection):
        return _inspection(found)
    if isinstance(found, Evaluation):
        return _evaluation(found)
    if isinstance(found, EncoderEvaluation):
        return _encoder(found)
    if isinstance(found, LayerEvaluation):
        return _layers(found)
    if isinstance(found, CalibrationSummary):
        return _calibration(found)
    raise TypeError(f"{type(found).__name__} has no report")


def _inspection(found: Inspection) -> str:
    packed, kept = groups_of(found)
    parts = [f"### {_text(str(found.checkpoint.name or found.checkpoint))}", " ".join(verdict_of_inspection(found))]
    rows = [
        (
            *(group.role, str(group.count), format_size(group.nbytes), group.stored),
            *("" if value is None else decibels(value, 2) for value in (group.sqnr_mean, group.sqnr_min)),
        )
        for group in packed
    ]
    parts.append(_table(("quantized", "tensors", "size", "format", "SQNR dB mean", "worst"), rows))
    parts.append(
        _table(
            ("kept", "tensors", "size", "dtype", "because"),
            [(group.role, str(group.count), format_size(group.nbytes), group.stored, group.reason) for group in kept],
        )
    )
    worst = [
        (f"`{tensor.name}`", decibels(tensor.sqnr, 2) if tensor.sqnr is not None else tensor.problem)
        for tensor in worst_of(found)
    ]
    parts.append(_table(("worst weights", "SQNR dB"), worst))
    words = {True: "yes", False: "no", None: "not known"}
    engines = [
        (NAMES[verdict.engine], words[verdict.loads], " ".join(map(str, verdict.tp)), verdict.reason)
        for verdict in found.engines
    ]
    parts.append(_table(("engine", "loads", "TP", "why"), engines))
    return _joined(parts)


def _evaluation(found: Evaluation) -> str:
    run = f"{', '.join(found.text)}: {found.num_documents} documents, {found.num_tokens} tokens predicted"
    parts = [f"### What FP8 cost {_text(str(found.source.name or found.source))}"]
    parts += [f"- {_text(said)}" for said in verdict_of_evaluation(found)]
    rows = []
    for name, field, how in METRICS:
        intervals: list[Interval] = [getattr(quality, field) for quality in found.checkpoints]
        rows.append((name, *(spread(interval, how) for interval in intervals)))
    rows.append(("KL largest", *(f"{quality.kl_max:.3g}" for quality in found.checkpoints)))
    parts.append(_table(("", *(f"`{label}`" for label in labels_of(found))), rows))
    parts.append(f"Values and 95 % intervals over documents; {_text(run)}; the source has perplexity "
                 f"{spread(found.perplexity, '.4g')} in {found.dtype}.")  # fmt: skip
    parts += [f"Note: {_text(note)}" for note in found.notes]
    return _joined(parts)


def _encoder(found: EncoderEvaluation) -> str:
    parts = [f"### What FP8 cost {_text(str(found.source.name or found.source))}"]
    columns = [dict(encoder_rows(quality)) for quality in found.checkpoints]
    rows = [
        (name, *(f"{cells[name][0]} ({cells[name][1]})" if cells[name][1] else cells[name][0] for cells in columns))
        for name in columns[0]
    ]
    parts.append(_table(("", *(f"`{quality.checkpoint}`" for quality in found.checkpoints)), rows))
    run = f"{', '.join(found.text)}: {found.num_texts} texts of {found.num_documents} documents"
    parts.append(f"Values and 95 % intervals over documents; {_text(run)}, in {found.dtype}.")
    return _joined(parts)


def card_section(found: Evaluation | EncoderEvaluation) -> str:
    """Return what one checkpoint cost as a section of its model card."""
    (quality,) = found.checkpoints
    if isinstance(quality, Quality):
        rows = [(name, *_cells(getattr(quality, field), how)) for name, field, how in METRICS]
        text = f"{found.num_documents} documents, by their next-token distributions"
    else:
        rows = [(name, value, interval) for name, (value, interval) in encoder_rows(quality)]
        text = f"sentences and lines of {found.num_documents} documents"
    head = "## What it cost the model"
    about = f"Measured by `fp8pack eval` against the source on {', '.join(found.text)} text: {_text(text)}; " + (
        f"activations {quality.activations}; {found.dtype} arithmetic with the FP8 values that are served."
    )
    return _joined([head, about, _table(("", "value", "95 % over documents"), rows)])


def _cells(found: Interval, how: str) -> tuple[str, str]:
    return f"{found.value:{how}}", f"{found.low:{how}} to {found.high:{how}}"


def _layers(found: LayerEvaluation) -> str:
    rows = [(f"`{part.name}`", spread(part.kl, ".3g"), f"{part.top1.value:.2%}") for part in found.parts]
    head = f"### What each {found.by} of {_text(found.checkpoint.name)} costs"
    return _joined([head, *verdict_of_layers(found), _table((f"{found.by} in FP8", "KL", "same top token"), rows)])


def _calibration(found: CalibrationSummary) -> str:
    parts = [f"### {_text(found.output.name)}", " ".join(verdict_of_calibration(found))]
    rows = [
        (f"`{site.points[0]}`", f"{site.amax:.4g}", f"{site.percentile_99_9:.4g}", f"{site.width or 0:.1f}")
        for site in found.widest
    ]
    parts.append(_table(("widest inputs", "amax", "99.9 %", "amax / 99.9 %"), rows))
    parts.append(
        _table(
            ("experts with too few tokens", "tokens"),
            [(f"`{e.point}`", str(e.tokens)) for e in found.rare_experts[:10]],
        )
    )
    return _joined(parts)


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(map(_text, line)) + " |" for line in lines)


def _text(words: str) -> str:
    """A text that no Markdown ends early."""
    return printable(words).replace("|", "\\|").replace("<", "&lt;")


def _joined(parts: Sequence[str]) -> str:
    return "\n\n".join(part for part in parts if part) + "\n"
