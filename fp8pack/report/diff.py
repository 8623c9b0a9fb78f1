"""What `diff` shows: a line for each tensor that differs, and the totals."""

from typing import Any

from rich.table import Table

from fp8pack.numerics.metrics import LOST_DB
from fp8pack.report.table import make_console, print_line


def print_diff(facts: dict[str, Any]) -> None:
    """Print the facts of a comparison to stdout."""
    console = make_console([tensor["name"] for tensor in facts["tensors"]])
    different = [tensor for tensor in facts["tensors"] if not tensor["equal"]]
    if different:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for header in ("tensor", "A", "B"):
            table.add_column(header, overflow="fold")
        for header in ("scale B / A", "equal bytes", "SQNR dB"):
            table.add_column(header, justify="right")
        for tensor in different:
            table.add_row(*_cells(tensor))
        console.print(table)
        print_line(console, "")
    for side, letter in (("only_in_a", "A"), ("only_in_b", "B")):
        if names := facts[side]:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            print_line(console, f"only in {letter}: {', '.join(names[:5])}{more}")
    totals = facts["totals"]
    line = f"{totals['num_equal']} of {totals['num_tensors']} common tensors have the same values"
    if totals["sqnr_min"] is not None:
        line += f"; SQNR mean {_db(totals['sqnr_mean'])}, worst {_db(totals['sqnr_min'])} dB"
        line += f" in {totals['sqnr_worst_tensor']}"
    print_line(console, line)


def _cells(tensor: dict[str, Any]) -> list[str]:
    if "other_shape" in tensor:
        shapes = [" x ".join(map(str, tensor[key])) for key in ("shape", "other_shape")]
        formats = [f"{name} {shape}" for name, shape in zip(tensor["formats"], shapes, strict=True)]
        return [tensor["name"], *formats, "", "", ""]
    ratio, share, sqnr = tensor["scale_ratio"], tensor["equal_bytes"], tensor["sqnr"]
    return [
        tensor["name"],
        *tensor["formats"],
        "" if ratio is None else f"{ratio[0]:.4g} to {ratio[1]:.4g}",
        "" if share is None else f"{share:.2%}",
        "" if sqnr is None else _db(sqnr),
    ]


def _db(sqnr: float) -> str:
    """An SQNR; one of the lowest stands for a NaN, infinity or zero where the other has a value."""
    return f"{sqnr:.1f}" if sqnr > LOST_DB else "lost"
