"""What `eval` prints: a table of the checkpoints, and where they differ most from the source."""

import math
import shlex

from rich.table import Table
from rich.text import Text

from fp8pack.evaluation.encoder_evaluation import EncoderEvaluation, EncoderQuality
from fp8pack.evaluation.evaluation import Evaluation, Quality
from fp8pack.evaluation.intervals import Interval
from fp8pack.evaluation.layer_evaluation import LayerEvaluation
from fp8pack.report.console import make_console, print_line
from fp8pack.report.quality import decibels
from fp8pack.report.text import shorten
from fp8pack.units import format_seconds

_WORST_LINEARS = 5
_SHOWN = 3  # documents and positions; --json has ten


def print_evaluation(found: Evaluation) -> None:
    """Print an evaluation to stdout."""
    console = make_console([str(quality.checkpoint) for quality in found.checkpoints])
    documents = f"{found.num_documents} document{'s' if found.num_documents > 1 else ''}"
    print_line(console, f"text     {', '.join(found.text)}: {documents}, {found.num_tokens} tokens predicted")
    print_line(console, f"source   {found.source}  {found.dtype}  perplexity {_spread(found.perplexity, '.4g')}")
    for note in found.notes:
        print_line(console, f"note     {note}")
    for quality in found.checkpoints:
        print_line(console, "")
        print_line(console, f"{quality.checkpoint}  activations {quality.activations}")
        console.print(_table(quality))
        print_line(console, "worst documents, mean KL")
        for document in quality.worst_documents[:_SHOWN]:
            print_line(console, f"  {document.kl:9.3g}  {document.name}")
        print_line(console, "worst positions: KL, what follows, its probability in the source and here")
        for place in quality.worst_positions[:_SHOWN]:
            shares = f"{place.base_probability:.1%} -> {place.probability:.1%}"
            print_line(console, f"  {place.kl:9.3g}  {place.before[-24:]!r} {place.following!r}  {shares}")
    print_line(console, f"result   {format_seconds(found.seconds)}")
    print_line(console, f"next     fp8pack recommend {shlex.quote(str(found.source))} compares schemes")


def print_encoder_evaluation(found: EncoderEvaluation) -> None:
    """Print an evaluation of an encoder to stdout."""
    console = make_console([str(quality.checkpoint) for quality in found.checkpoints])
    texts = f"{found.num_documents} documents, {found.num_texts} sentences or lines, {found.num_tokens} tokens"
    print_line(console, f"text     {', '.join(found.text)}: {texts}")
    pooling = f"  pooling {found.pooling}" if found.pooling else ""
    print_line(console, f"source   {found.source}  {found.dtype}  {found.kind}{pooling}")
    for note in found.notes:
        print_line(console, f"note     {note}")
    for quality in found.checkpoints:
        print_line(console, "")
        print_line(console, f"{quality.checkpoint}  activations {quality.activations}")
        table = _measures_table()
        for name, cells in encoder_rows(quality):
            table.add_row(*map(Text, (name, *cells)))
        console.print(table)
        print_line(console, "worst texts: KL" if found.kind == "classes" else "worst texts: cosine")
        for text in quality.worst[:_SHOWN]:
            print_line(console, f"  {text.value:9.6f}  {text.text[:60]!r}")
    print_line(console, f"result   {format_seconds(found.seconds)}")


def print_layer_evaluation(found: LayerEvaluation) -> None:
    """Print what each layer or linear costs to stdout."""
    console = make_console([part.name for part in found.parts])
    run = f"{found.num_documents} documents, {found.num_tokens} tokens predicted"
    print_line(console, f"text     {', '.join(found.text)}: {run}")
    print_line(console, f"source   {found.source}  {found.dtype}  perplexity {_spread(found.perplexity, '.4g')}")
    for note in found.notes:
        print_line(console, f"note     {note}")
    print_line(console, "")
    print_line(console, f"{found.checkpoint}  activations {found.activations}  one {found.by} at a time in FP8")
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 2))
    for header in (found.by, "KL mean", "95 % over documents", "same top token"):
        table.add_column(header, justify="left" if header == found.by else "right")
    names = max(20, console.width - 58)
    for part in found.parts:
        interval = f"{part.kl.low:.3g} to {part.kl.high:.3g}"
        cells = (shorten(part.name, names), f"{part.kl.value:.3g}", interval, f"{part.top1.value:.2%}")
        table.add_row(*map(Text, cells))
    console.print(table)
    worst = sorted(found.linears, key=lambda linear: -math.inf if linear.sqnr is None else linear.sqnr)
    if worst:
        print_line(console, f"worst outputs of linears: SQNR dB, over {found.num_linear_tokens} tokens")
    for linear in worst[:_WORST_LINEARS]:
        sqnr = "NaN" if linear.sqnr is None else decibels(linear.sqnr, 2)
        print_line(console, f"  {sqnr:>7}  {shorten(linear.name, max(20, console.width - 12))}")
    print_line(console, f"result   {format_seconds(found.seconds)}")


def encoder_rows(quality: EncoderQuality) -> list[tuple[str, tuple[str, str]]]:
    """Return the name, value and interval of each measure of an encoder."""
    rows: list[tuple[str, Interval | float | None, str]] = [
        ("cosine, mean", quality.cosine, ".6f"),
        ("cosine, smallest", quality.cosine_min, ".6f"),
        ("rank correlation", quality.rank_correlation, ".6f"),
        ("same nearest neighbour", quality.neighbours, ".2%"),
        ("same label", quality.agreement, ".2%"),
        ("KL mean", quality.kl, ".3g"),
    ]
    return [
        (name, (f"{found.value:{how}}", f"{found.low:{how}} to {found.high:{how}}"))
        if isinstance(found, Interval)
        else (name, (f"{found:{how}}", ""))
        for name, found, how in rows
        if found is not None
    ]


def _measures_table() -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 2))
    for header in ("", "value", "95 % over documents"):
        table.add_column(header, justify="left" if not header else "right")
    return table


def _table(quality: Quality) -> Table:
    table = _measures_table()
    rows: list[tuple[str, Interval, str]] = [
        ("perplexity", quality.perplexity, ".4g"),
        ("perplexity / source", quality.ppl_ratio, ".5f"),
        ("KL mean", quality.kl, ".3g"),
        ("KL median", quality.kl_median, ".3g"),
        ("KL 90 %", quality.kl_p90, ".3g"),
        ("KL 99 %", quality.kl_p99, ".3g"),
        ("KL 99.9 %", quality.kl_p999, ".3g"),
        ("same top token", quality.top1, ".2%"),
        ("same top five", quality.top5, ".2%"),
        ("probability, RMS change", quality.probability_rms, ".3g"),
    ]
    for name, found, how in rows:
        table.add_row(*map(Text, (name, f"{found.value:{how}}", f"{found.low:{how}} to {found.high:{how}}")))
    table.add_row(*map(Text, ("KL largest", f"{quality.kl_max:.3g}", "")))
    return table


def _spread(found: Interval, how: str) -> str:
    return f"{found.value:{how}} (95 % {found.low:{how}} to {found.high:{how}})"
