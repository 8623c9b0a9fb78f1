"""What `inspect` prints: a line for each tensor, and the totals."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fp8pack.reading.inspection import Inspection, TensorInspection
from fp8pack.report.engines import engine_lines
from fp8pack.report.quality import decibels
from fp8pack.report.text import natural, printable, shorten
from fp8pack.units import format_size

_WIDTH = 160  # of a table that goes to a file or a pipe
_NAME_SHARE = 0.45  # of a terminal, for names


def print_inspection(found: Inspection, asked: Sequence[str] = ()) -> None:
    """Print the tensors of a checkpoint to stdout, and the engines that load it; `asked`: those asked for."""
    console = make_console([tensor.name for tensor in found.tensors])
    names = int(console.width * _NAME_SHARE) if console.is_terminal else console.width
    static = any(tensor.activation_scales for tensor in found.tensors)
    measured = any(tensor.sqnr is not None for tensor in found.tensors)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for header in ("tensor", "role", "format", "shape"):
        table.add_column(header, overflow="fold")
    extra = [*(["input, K, V scale"] if static else []), *(["SQNR dB"] if measured else [])]
    for header in ("scale min", "scale max", *extra):
        table.add_column(header, justify="right")
    table.add_column("ignored because", overflow="fold")
    for tensor in sorted(found.tensors, key=lambda tensor: natural(tensor.name)):
        cells = _cells(tensor, static=static, measured=measured)
        table.add_row(*(Text(printable(cell)) for cell in (shorten(cells[0], names), *cells[1:])))
    console.print(table)
    warnings = [f"warning  {warning}" for warning in found.warnings]
    verdicts = engine_lines(found.engines, asked=asked, command="fp8pack convert ")
    for line in ("", *_totals(found), *warnings, *verdicts):
        print_line(console, line)


class _Console(Console):
    """Leaves the error of a closed pipe to the caller."""

    def on_broken_pipe(self) -> None:
        """Raise the error that rich is about to turn into an exit."""
        raise  # noqa: PLE0704  (it is called where the error is handled)


def make_console(names: list[str]) -> Console:
    """Return a console for stdout, wide enough for these names and the other columns, unless it is a terminal."""
    console = _Console(highlight=False, soft_wrap=False)
    if console.is_terminal:
        return console
    return _Console(highlight=False, width=max(_WIDTH, max(map(len, names), default=0) + 100))


def print_line(console: Console, line: str) -> None:
    """Print a line of text as it is, with control characters from files escaped."""
    console.print(Text(printable(line)), soft_wrap=True)


def _cells(tensor: TensorInspection, *, static: bool, measured: bool) -> list[str]:
    packed, scale = tensor.action == "packed", tensor.scale
    cells = [
        tensor.name,
        tensor.role,
        f"{tensor.format} {tensor.granularity}" if packed else tensor.dtype,
        " x ".join(map(str, tensor.shape)) or "scalar",
    ]
    cells += [f"{scale.min:.3g}", f"{scale.max:.3g}"] if scale else ["", ""]
    activations = (tensor.activation_scales or {}).items()
    cells += [" ".join(f"{kind} {value:.3g}" for kind, value in activations)] if static else []
    cells += [decibels(tensor.sqnr) if tensor.sqnr is not None else ""] if measured else []
    return [*cells, "" if packed else tensor.reason.removeprefix("policy: ")]


def _totals(found: Inspection) -> list[str]:
    totals, recipe = found.totals, found.recipe
    architecture = f", {found.architecture}" if found.architecture else ""
    lines = [f"{totals.num_tensors} tensors, {format_size(totals.nbytes)}{architecture}"]
    payload = format_size(totals.packed_nbytes)
    if recipe and "scheme" in recipe:
        lines.append(f"{totals.num_packed} packed, {payload}: {recipe['scheme']}, {found.quant_method or 'fp8pack'}")
    elif totals.num_packed:
        method = found.quant_method or "config.json has no quantization_config"
        lines.append(f"{totals.num_packed} FP8 weights, {payload}: {method}; from another tool, without a manifest")
    else:
        lines.append("not packed: no tensor is FP8")
    if found.root:
        lines.append(f"root {found.root} (from the manifest; the bytes were not read)")
    if totals.sqnr_min is not None and totals.sqnr_mean is not None:
        worst = f"worst {decibels(totals.sqnr_min, 2)} dB in {totals.sqnr_worst_tensor}"
        of = f"mean {decibels(totals.sqnr_mean, 2)}, {worst}"
        lines.append(f"weight SQNR against the source (all elements): {of}")
    return lines
