"""What `inspect CHECKPOINT TENSOR` prints."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fp8pack.reading.tensor_detail import Histogram, TensorDetail
from fp8pack.report.console import make_console, print_line
from fp8pack.report.quality import decibels, share
from fp8pack.units import format_size

_BAR = 40
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def print_tensor(found: TensorDetail) -> None:
    """Print one tensor to stdout."""
    console, tensor = make_console([]), found.tensor
    shape = " x ".join(map(str, tensor.shape)) or "scalar"
    stored = f"{tensor.format} {tensor.granularity}" if tensor.format else tensor.dtype
    print_line(console, f"{tensor.name}  {tensor.role}, {stored}, {shape}, {format_size(tensor.nbytes)}")
    print_line(console, f"{tensor.action:8} {tensor.reason}")
    if tensor.problem:
        print_line(console, f"damaged  {tensor.problem}")
    if tensor.amax is not None:
        print_line(console, f"amax     {tensor.amax:.4g} in the source")
    if tensor.scale and tensor.scale.spread:
        scale, spread = tensor.scale, f"{tensor.scale.spread:.3g}x"
        print_line(console, f"scales   {scale.min:.4g} to {scale.max:.4g} ({spread}) in {scale.tensor}")
    for kind, value in (tensor.activation_scales or {}).items():
        print_line(console, f"scale    of {kind}: {value:.4g}")
    _print_error(console, found)
    _print_histogram(console, "values", found.values)
    _print_histogram(console, "exponents: values from 2^e to 2^(e+1)", found.exponents)
    if found.scales is not None and len(found.scales.counts) > 1:
        _print_histogram(console, "scales", found.scales)
    if found.alternatives:
        print_line(console, "")
        console.print(_alternatives(found))


def _print_error(console: Console, found: TensorDetail) -> None:
    sqnr, error = found.tensor.sqnr, found.tensor.error
    if error is None or sqnr is None:
        return
    cosine = f"cosine {error.cosine:.7f}, " if error.cosine is not None else ""
    relative = f"relative error {share(error.relative_mean)} mean, {share(error.relative_max)} largest"
    print_line(console, f"SQNR     {decibels(sqnr, 2)} dB against {found.against}; {cosine}{relative}")
    parts = (("to zero", error.flushed), ("subnormal", error.subnormal), ("clipped", error.saturated))
    shares = ", ".join(f"{name} {share(value)}" for name, value in parts if value is not None)
    outliers = f"; amax {error.outlier_ratio:.1f} times the root mean square" if error.outlier_ratio else ""
    print_line(console, f"elements {shares}{outliers}")


def _print_histogram(console: Console, title: str, found: Histogram) -> None:
    most, total = max(found.counts, default=0) or 1, sum(found.counts) or 1
    print_line(console, "")
    print_line(console, title)
    for edge, count in zip(found.edges, found.counts, strict=False):
        eighths = round(8 * _BAR * count / most)
        bar = "█" * (eighths // 8) + (_EIGHTHS[eighths % 8] if eighths % 8 else "")
        print_line(console, f"{edge:>11.3g}  {bar or ('▏' if count else ''):{_BAR}}  {share(count / total)}")
    print_line(console, f"{found.edges[-1]:>11.3g}")


def _alternatives(found: TensorDetail) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for header in ("format", "size", "SQNR dB", "error mean", "to zero", "subnormal"):
        table.add_column(header, justify="left" if header == "format" else "right")
    tensor = found.tensor
    for other in found.alternatives:
        here = " (stored)" if (other.format, other.granularity) == (tensor.format, tensor.granularity) else ""
        sqnr = decibels(other.sqnr, 2) if other.sqnr is not None else "NaN"
        shares = map(share, (other.error.relative_mean, other.error.flushed, other.error.subnormal))
        cells = (f"{other.format} {other.granularity}{here}", format_size(other.nbytes), sqnr, *shares)
        table.add_row(*map(Text, cells))
    return table
