"""The page of `eval --per-layer --html`."""

import math

from fp8pack.evaluation.layer_evaluation import LayerEvaluation
from fp8pack.report.page.document import document
from fp8pack.report.page.inspection import by_layer
from fp8pack.report.page.parts import Column, bars, facts, heat_map, long_table, paragraph, section
from fp8pack.report.quality import decibels
from fp8pack.report.sentences import spread, verdict_of_layers
from fp8pack.units import format_seconds, format_size

_MOST_BARS = 80


def _frontier(found: LayerEvaluation) -> list[tuple[str, float, str]]:
    """The sum of KL divergences when the first parts are kept, those first that gain most for a byte."""
    order = sorted(found.parts, key=lambda part: -part.kl.value / max(part.num_elements, 1))
    rows, left, nbytes = [], math.fsum(part.kl.value for part in order), 0
    for kept, part in enumerate([None, *order]):
        if part is not None:
            left, nbytes = max(0.0, left - part.kl.value), nbytes + part.num_elements
        name = f"{kept} kept, +{format_size(nbytes)}" + (f": {part.name.removeprefix('model.')}" if part else "")
        rows.append((name, left, f"{left:.3g}"))
    return rows[:: max(1, -(-len(rows) // _MOST_BARS))]


def layers_page(found: LayerEvaluation, command: str = "") -> str:
    """Return what each layer or linear costs as a page."""
    parts = found.parts if len(found.parts) <= _MOST_BARS else found.worst[:_MOST_BARS]
    costs = [(part.name.removeprefix("model."), part.kl.value, spread(part.kl, ".3g")) for part in parts]
    kl = {part.name: part.kl.value for part in found.parts}
    run = f"{found.num_documents} documents, {found.num_tokens} tokens predicted; {format_seconds(found.seconds)}"
    columns = (
        Column("name", f"{found.by} in FP8"),
        Column("kl", "KL mean", number=True, digits=3, down=True),
        Column("low", "95 % from", number=True, digits=3),
        Column("high", "to", number=True, digits=3, down=True),
        Column("top1", "same top token", number=True, percent=True),
    )
    values = (
        [part.name for part in found.parts],
        [part.kl.value for part in found.parts],
        [part.kl.low for part in found.parts],
        [part.kl.high for part in found.parts],
        [part.top1.value for part in found.parts],
    )
    sqnr = {linear.name: linear.sqnr if linear.sqnr is not None else math.nan for linear in found.linears}
    caption = f"SQNR of outputs in dB, over {found.num_linear_tokens} tokens; darker is worse"
    return document(
        f"{found.checkpoint.name or found.checkpoint}: what each {found.by} costs",
        [
            *(paragraph(said, "lead") for said in verdict_of_layers(found)),
            facts(
                [
                    ("source", f"{found.source}, {found.dtype}, perplexity {spread(found.perplexity, '.4g')}"),
                    ("activations", found.activations),
                    ("text", ", ".join(found.text)),
                    ("run", run),
                ]
            ),
            *(paragraph(f"Note: {note}", "note") for note in found.notes),
            section("KL divergence", bars(f"Of the model with one {found.by} in FP8, in nats", costs)),
            section("KL by layer and linear", heat_map("Darker is worse", *by_layer(kl, max), "{:.2g}".format))
            if found.by == "linear"
            else "",
            section(
                "What keeping some would save", bars("KL divergence, the sum of the parts in FP8", _frontier(found))
            ),
            section(
                "Outputs of linears",
                heat_map(caption, *by_layer(sqnr, min), lambda value: decibels(value, 1), low_is_dark=True),
            ),
            section("All", long_table("parts", columns, values, "mlp kl>0.0001")),
        ],
        command,
    )
