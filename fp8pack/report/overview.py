"""What `inspect` prints: what a checkpoint is, what was quantized and kept, what it cost, and who loads it."""

import shlex
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fp8pack.reading.groups import Group, groups_of, worst_of
from fp8pack.reading.inspection import Inspection
from fp8pack.report.console import make_console, print_line
from fp8pack.report.engines import engine_lines
from fp8pack.report.quality import decibels
from fp8pack.report.text import printable, shorten
from fp8pack.units import format_size

_MOST_GROUPS = 10


def print_overview(found: Inspection, asked: Sequence[str] = (), *, brief: bool = False) -> None:
    """Print what a checkpoint is to stdout; `asked`: engines; `brief`: without groups and worst tensors."""
    console = make_console([])
    for line in _head(found):
        print_line(console, line)
    if not brief:
        packed, kept = groups_of(found)
        _print_groups(console, packed, ("packed", "tensors", "size", "format", "scales", "SQNR mean, worst"))
        _print_groups(console, kept, ("kept", "tensors", "size", "dtype", "because"))
        _print_worst(console, found)
        print_line(console, "")
    for line in _tail(found, asked):
        print_line(console, line)
    if not brief:
        print_line(console, f"next     {_next(found)}")


def _head(found: Inspection) -> list[str]:
    totals, recipe = found.totals, found.recipe
    architecture = f", {found.architecture}" if found.architecture else ""
    lines = [f"{found.checkpoint}  {totals.num_tensors} tensors, {format_size(totals.nbytes)}{architecture}"]
    payload = f"{totals.num_packed} packed, {format_size(totals.packed_nbytes)}"
    change = totals.nbytes / totals.source_nbytes - 1 if totals.source_nbytes else 0.0
    before = f"{format_size(totals.source_nbytes)} before ({change:+.0%})".replace("-", "\N{MINUS SIGN}")
    if recipe and "scheme" in recipe and totals.num_packed:
        reason = f" ({recipe['reason']})" if recipe.get("reason") else ""
        lines.append(f"scheme   {recipe['scheme']}{reason}, {found.quant_method or 'fp8pack'}; by fp8pack")
        lines.append(f"weights  {payload}; {before}")
    elif totals.num_packed:
        method = found.quant_method or "config.json has no quantization_config"
        lines.append(f"scheme   {method}; by another tool, without a manifest")
        lines.append(f"weights  {payload}; {before}")
    else:
        lines.append("weights  not packed: no tensor is FP8")
    if totals.num_spoiled:
        spoiled = [tensor for tensor in found.tensors if tensor.problem]
        lines.append(f"damaged  {spoiled[0].name}: {spoiled[0].problem}")
        lines += [f"         and {len(spoiled) - 1} more tensors"] if len(spoiled) > 1 else []
    if totals.sqnr_min is not None and totals.sqnr_mean is not None:
        of = f"mean {decibels(totals.sqnr_mean, 2)}, worst {decibels(totals.sqnr_min, 2)} dB"
        lines.append(f"SQNR     of weights against {found.against} (all elements): {of}")
    if totals.output_sqnr_min is not None:
        worst = min((t for t in found.tensors if t.output_sqnr is not None), key=lambda t: t.output_sqnr or 0.0)
        lines.append(f"outputs  SQNR predicted: worst {decibels(totals.output_sqnr_min, 2)} dB in {worst.name}")
    return lines


def _print_groups(console: Console, groups: Sequence[Group], headers: Sequence[str]) -> None:
    if not groups:
        return
    measured = any(group.sqnr_min is not None for group in groups)
    kept = headers[-1] == "because"
    headers = headers if measured or kept else headers[:-1]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for header in headers:
        table.add_column(header, justify="right" if header in ("tensors", "size") else "left", overflow="fold")
    for group in groups[:_MOST_GROUPS]:
        cells = [group.role, str(group.count), format_size(group.nbytes), group.stored]
        if kept:
            cells.append(group.reason)
        else:
            known = group.scale_min is not None and group.scale_max is not None
            cells.append(f"{group.scale_min:.2g} to {group.scale_max:.2g}" if known else "")
            if measured:
                both = group.sqnr_mean is not None and group.sqnr_min is not None
                cells.append(f"{decibels(group.sqnr_mean or 0)}, {decibels(group.sqnr_min or 0)}" if both else "")
        table.add_row(*(Text(printable(cell)) for cell in cells))
    print_line(console, "")
    console.print(table)
    if len(groups) > _MOST_GROUPS:
        rest = groups[_MOST_GROUPS:]
        print_line(console, f"and {sum(group.count for group in rest)} tensors of {len(rest)} other kinds")


def _print_worst(console: Console, found: Inspection) -> None:
    worst = worst_of(found)
    if not worst:
        return
    print_line(console, "")
    print_line(console, "worst    SQNR dB, cosine")
    for tensor in worst:
        sqnr = decibels(tensor.sqnr, 2) if tensor.sqnr is not None else "NaN"
        cosine = f"{tensor.error.cosine:.6f}" if tensor.error and tensor.error.cosine is not None else ""
        name = shorten(tensor.name, max(20, console.width - 30))
        print_line(console, f"         {sqnr:>7}  {cosine:8}  {name}")


def _tail(found: Inspection, asked: Sequence[str]) -> list[str]:
    lines = [f"warning  {warning}" for warning in found.warnings]
    lines += engine_lines(found.engines, asked=asked, command="fp8pack convert ")
    if found.root:
        lines.append(f"root     {found.root}")
        lines.append("         as the manifest says; the bytes were not read (fp8pack verify reads them)")
    return lines


def _next(found: Inspection) -> str:
    path = shlex.quote(str(found.checkpoint))
    if not found.totals.num_packed:
        return f"fp8pack pack {path}"
    if found.against is None:
        return f"fp8pack inspect {path} --against SOURCE  (what the weights lost)"
    return f"fp8pack eval {path} --against {shlex.quote(str(found.against))}  (what the model lost)"
