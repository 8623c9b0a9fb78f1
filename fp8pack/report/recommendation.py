"""What `recommend` prints."""

from rich.table import Table
from rich.text import Text

from fp8pack.evaluation.recommendation import Recommendation
from fp8pack.report.console import make_console, print_line
from fp8pack.report.text import printable
from fp8pack.units import format_seconds, format_size


def print_recommendation(found: Recommendation) -> None:
    """Print the table of schemes, and which to take."""
    console = make_console([str(found.source)])
    print_line(console, f"text     {', '.join(found.text)}: {found.num_tokens} tokens predicted")
    for note in found.notes:
        print_line(console, f"note     {note}")
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for header in ("scheme", "activations", "rounding", "size", "KL (95 %)", "same top token"):
        table.add_column(header, justify="left" if header in ("scheme", "activations", "rounding") else "right")
    for option in found.options:
        if option.kl is not None and option.top1 is not None and option.nbytes is not None:
            kl = f"{option.kl.value:.3g} ({option.kl.low:.2g} to {option.kl.high:.2g})"
            cells = (option.activations, option.rounding, format_size(option.nbytes), kl, f"{option.top1.value:.2%}")
            table.add_row(*map(Text, (option.scheme, *cells)))
    console.print(table)
    for option in found.options:
        if option.problem:
            print_line(console, f"not      {option.scheme} {option.rounding}: {printable(option.problem)}")
    print_line(console, f"take     {found.take}: {found.why}")
    print_line(console, f"next     {found.command}")
    print_line(console, f"result   {format_seconds(found.seconds)}")
