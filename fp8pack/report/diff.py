"""What `diff` prints: a line for each tensor that differs, and the totals."""

from rich.table import Table

from fp8pack.reading.comparison import Comparison, TensorComparison
from fp8pack.report.console import make_console, print_line
from fp8pack.report.quality import decibels
from fp8pack.report.text import listed
from fp8pack.units import natural


def print_diff(found: Comparison) -> None:
    """Print a comparison to stdout."""
    console = make_console([tensor.name for tensor in found.tensors])
    different = [tensor for tensor in found.tensors if not tensor.equal]
    if different:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for header in ("tensor", "A", "B"):
            table.add_column(header, overflow="fold")
        for header in ("scale B / A", "equal bytes", "SQNR dB"):
            table.add_column(header, justify="right")
        for tensor in sorted(different, key=lambda tensor: natural(tensor.name)):
            table.add_row(*_cells(tensor))
        console.print(table)
        print_line(console, "")
    for letter, names in (("A", found.only_in_a), ("B", found.only_in_b)):
        if names:
            print_line(console, f"only in {letter}: {listed(sorted(names, key=natural), 5)}")
    totals = found.totals
    line = f"{totals.num_equal} of {totals.num_tensors} common tensors have the same values"
    if totals.sqnr_min is not None and totals.sqnr_mean is not None:
        line += f"; SQNR of B against A: mean {decibels(totals.sqnr_mean)}, worst {decibels(totals.sqnr_min)} dB"
        line += f" in {totals.sqnr_worst_tensor}"
    print_line(console, line)


def _cells(tensor: TensorComparison) -> list[str]:
    if tensor.other_shape is not None:
        shapes = [" x ".join(map(str, shape)) for shape in (tensor.shape, tensor.other_shape)]
        formats = [f"{name} {shape}" for name, shape in zip(tensor.formats, shapes, strict=True)]
        return [tensor.name, *formats, "", "", ""]
    ratio, share, sqnr = tensor.scale_ratio, tensor.equal_bytes, tensor.sqnr
    return [
        tensor.name,
        *tensor.formats,
        "" if ratio is None else f"{ratio[0]:.4g} to {ratio[1]:.4g}",
        "" if share is None else f"{share:.2%}",
        f"{tensor.num_nonfinite} NaN" if tensor.num_nonfinite else "" if sqnr is None else decibels(sqnr),
    ]
