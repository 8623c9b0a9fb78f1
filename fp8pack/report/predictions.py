"""What `inspect SOURCE --calibration FILE` prints: what each output would lose, by format and granularity."""

from rich.table import Table
from rich.text import Text

from fp8pack.reading.predict import OutputPredictions
from fp8pack.report.console import make_console, print_line
from fp8pack.report.quality import decibels
from fp8pack.report.text import listed, printable, shorten

_SHOWN = {
    "e4m3 tensor": "tensor",
    "e4m3 channel": "channel",
    "e4m3 group:128": "group",
    "e4m3 block:128x128": "block",
    "e4m3 mx": "mx",
    "e5m2 channel": "e5m2 channel",
}
_NUMBERS_WIDTH = 58


def print_predictions(found: OutputPredictions) -> None:
    """Print predictions to stdout."""
    console = make_console([linear.tensor for linear in found.linears])
    inputs = "not quantized" if found.activations == "none" else f"E4M3, {found.activations}"
    print_line(console, f"SQNR in dB of each output, predicted from {found.calibration}; inputs {inputs}")
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("linear", no_wrap=True)
    for header in _SHOWN.values():
        table.add_column(header, justify="right")
    for linear in found.linears:
        numbers = ("NaN" if (sqnr := linear.sqnr[key]) is None else decibels(sqnr) for key in _SHOWN)
        name = shorten(printable(linear.tensor.removesuffix(".weight")), max(20, console.width - _NUMBERS_WIDTH))
        table.add_row(*map(Text, (name, *numbers)))
    console.print(table)
    if found.unseen:
        print_line(console, f"unseen   {len(found.unseen)} linears have no statistics: {listed(list(found.unseen))}")
    print_line(
        console, "note     channels are taken for independent: compare columns; `fp8pack eval --per-layer` measures"
    )
