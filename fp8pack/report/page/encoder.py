"""The page of `eval --html` of an encoder."""

from fp8pack.evaluation.encoder_evaluation import EncoderEvaluation
from fp8pack.report.evaluation import encoder_rows
from fp8pack.report.page.document import document
from fp8pack.report.page.parts import facts, paragraph, section, table
from fp8pack.units import format_seconds


def encoder_page(found: EncoderEvaluation, command: str = "") -> str:
    """Return an evaluation of an encoder as a page."""
    run = f"{found.num_texts} sentences or lines of {found.num_documents} documents, {found.num_tokens} tokens"
    sections = [
        facts(
            [
                ("source", f"{found.source}, {found.dtype}"),
                ("output", f"{found.kind}{', pooling ' + found.pooling if found.pooling else ''}"),
                ("text", ", ".join(found.text)),
                ("run", f"{run}; {format_seconds(found.seconds)}"),
            ]
        ),
        *(paragraph(f"Note: {note}", "note") for note in found.notes),
    ]
    for quality in found.checkpoints:
        rows = [(name, value, interval) for name, (value, interval) in encoder_rows(quality)]
        worst = [(f"{text.value:.6f}", text.text) for text in quality.worst]
        headers = ("KL" if found.kind == "classes" else "cosine", "text")
        measures = table("Against the source", ("", "value", "95 % over documents"), rows, numbers=(1, 2))
        sections.append(section(str(quality.checkpoint), measures, table("Worst texts", headers, worst, numbers=(0,))))
    return document(f"{found.source.name or found.source}: what FP8 cost", sections, command)
