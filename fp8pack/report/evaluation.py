"""What `eval` prints: a table of the checkpoints, and where they differ most from the source."""

from rich.table import Table
from rich.text import Text

from fp8pack.evaluation.evaluation import Evaluation, Quality
from fp8pack.evaluation.intervals import Interval
from fp8pack.report.console import make_console, print_line
from fp8pack.units import format_seconds

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


def _table(quality: Quality) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 2))
    for header in ("", "value", "95 % over documents"):
        table.add_column(header, justify="left" if not header else "right")
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
