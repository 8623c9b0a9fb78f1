"""What `inspect --tensors` prints: a line for each tensor."""

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from fp8pack.reading.inspection import TensorInspection
from fp8pack.report.console import make_console
from fp8pack.report.quality import decibels, share
from fp8pack.report.text import printable, shorten

_NAME_SHARE = 0.45  # of a terminal, for names
_NARROW, _WIDE = 120, 150  # columns of a terminal: less has no room for all columns, more has it for every metric
_METRICS = ("error mean", "to zero", "subnormal", "clipped", "amax / rms")
_FORMAT_WIDTH, _NUMBER_WIDTH = 22, 10


def print_tensors(tensors: Sequence[TensorInspection]) -> None:
    """Print tensors to stdout, in this order."""
    console = make_console([tensor.name for tensor in tensors])
    static = any(tensor.activation_scales for tensor in tensors)
    measured = any(tensor.error for tensor in tensors)
    if console.is_terminal and console.width < _NARROW:
        console.print(_narrow_table(tensors, console.width))
        return
    names = int(console.width * _NAME_SHARE) if console.is_terminal else console.width
    whole = measured and (console.width >= _WIDE or not console.is_terminal)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for header in ("tensor", "role", "format", "shape"):
        table.add_column(header, overflow="fold")
    extra = [*(["input, K, V scale"] if static else []), *(["SQNR dB"] if measured else [])]
    for header in ("scale min", "scale max", *extra, *(_METRICS if whole else ())):
        table.add_column(header, justify="right")
    table.add_column("ignored because", overflow="fold")
    for tensor in tensors:
        cells = _cells(tensor, static=static, measured=measured, whole=whole)
        table.add_row(*(Text(printable(cell)) for cell in (shorten(cells[0], names), *cells[1:])))
    console.print(table)


def _narrow_table(tensors: Sequence[TensorInspection], width: int) -> Table:
    """A line for each tensor that no column breaks."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for header in ("tensor", "format"):
        table.add_column(header, no_wrap=True)
    for header in ("scale max", "SQNR dB"):
        table.add_column(header, justify="right", no_wrap=True)
    names = width - _FORMAT_WIDTH - 2 * _NUMBER_WIDTH
    for tensor in tensors:
        stored = f"{tensor.format} {tensor.granularity}" if tensor.format else tensor.dtype
        scale = f"{tensor.scale.max:.3g}" if tensor.scale and tensor.scale.max is not None else ""
        sqnr = "NaN" if tensor.problem else decibels(tensor.sqnr) if tensor.sqnr is not None else ""
        table.add_row(*map(Text, (shorten(printable(tensor.name), names), stored, scale, sqnr)))
    return table


def _cells(tensor: TensorInspection, *, static: bool, measured: bool, whole: bool) -> list[str]:
    packed, scale = bool(tensor.format), tensor.scale
    cells = [
        tensor.name,
        tensor.role,
        f"{tensor.format} {tensor.granularity}" if packed else tensor.dtype,
        " x ".join(map(str, tensor.shape)) or "scalar",
    ]
    numbers = (scale.min, scale.max) if scale else (None, None)
    cells += [f"{number:.3g}" if number is not None else "" for number in numbers]
    activations = (tensor.activation_scales or {}).items()
    cells += [" ".join(f"{kind} {value:.3g}" for kind, value in activations)] if static else []
    cells += [tensor.problem or (decibels(tensor.sqnr) if tensor.sqnr is not None else "")] if measured else []
    cells += _errors(tensor) if whole else []
    reason = "" if packed else tensor.reason.removeprefix("policy: ")
    return [*cells, reason if measured or not tensor.problem else tensor.problem]


def _errors(tensor: TensorInspection) -> list[str]:
    error = tensor.error
    if error is None or error.num_nonfinite:
        return [""] * len(_METRICS)
    outliers = f"{error.outlier_ratio:.1f}" if error.outlier_ratio is not None else ""
    return [*map(share, (error.relative_mean, error.flushed, error.subnormal, error.saturated)), outliers]
