"""What `inspect` shows: a table with a line for each tensor, and the totals."""

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fp8pack.report.engines import engine_lines
from fp8pack.report.text import printable
from fp8pack.units import format_size

_WIDTH = 160  # of a table that goes to a file or a pipe


def print_inspection(facts: dict[str, Any]) -> None:
    """Print the facts of a checkpoint to stdout."""
    console = make_console([tensor["name"] for tensor in facts["tensors"]])
    static = any("activation_scales" in tensor for tensor in facts["tensors"])
    measured = any(tensor.get("sqnr") is not None for tensor in facts["tensors"])
    table = Table(box=None, pad_edge=False, header_style="bold")
    for header in ("tensor", "role", "format", "shape"):
        table.add_column(header, overflow="fold")
    for header in (
        "scale min",
        "scale max",
        *(["input, K, V scale"] if static else []),
        *(["SQNR dB"] if measured else []),
    ):
        table.add_column(header, justify="right")
    table.add_column("kept because", overflow="fold")
    for tensor in facts["tensors"]:
        table.add_row(*(Text(printable(cell)) for cell in _cells(tensor, static, measured)))
    console.print(table)
    warnings = [f"warning  {warning}" for warning in facts["warnings"]]
    for line in ("", *_totals(facts), *warnings, *engine_lines(facts["engines"], "fp8pack convert ")):
        print_line(console, line)


class _Console(Console):
    """Leaves a pipe whose reader went away to who prints."""

    def on_broken_pipe(self) -> None:
        """Raise the error that rich is about to turn into an exit."""
        raise  # noqa: PLE0704  (it is called where the error is handled)


def make_console(names: list[str]) -> Console:
    """Return a console for stdout, wide enough for these names and what stands beside them, unless it is a terminal."""
    console = _Console(highlight=False, soft_wrap=False)
    if console.is_terminal:
        return console
    return _Console(highlight=False, width=max(_WIDTH, max(map(len, names), default=0) + 100))


def print_line(console: Console, line: str) -> None:
    """Print a line of text as it is, with control characters from files escaped."""
    console.print(Text(printable(line)), soft_wrap=True)


def _cells(tensor: dict[str, Any], static: bool, measured: bool) -> list[str]:
    packed = tensor["action"] == "packed"
    scale = tensor.get("scale")
    cells = [
        tensor["name"],
        tensor["role"],
        f"{tensor['format']} {tensor['granularity']}" if packed else tensor["dtype"],
    ]
    cells += [" x ".join(map(str, tensor["shape"])) or "scalar"]
    cells += [f"{scale['min']:.3g}", f"{scale['max']:.3g}"] if scale else ["", ""]
    activations = tensor.get("activation_scales", {}).items()
    cells += [" ".join(f"{kind} {value:.3g}" for kind, value in activations)] if static else []
    cells += [f"{tensor['sqnr']:.1f}" if tensor.get("sqnr") is not None else ""] if measured else []
    return [*cells, "" if packed else tensor["reason"].removeprefix("policy: ")]


def _totals(facts: dict[str, Any]) -> list[str]:
    totals, recipe = facts["totals"], facts["recipe"]
    lines = [
        f"{totals['num_tensors']} tensors, {format_size(totals['nbytes'])}"
        + (f", {facts['architecture']}" if facts["architecture"] else "")
    ]
    if recipe:
        payload = format_size(totals["packed_nbytes"])
        lines.append(f"{totals['num_packed']} packed, {payload}: {recipe['scheme']}, {recipe['quant_method']}")
        lines.append(f"root {facts['root']}")
    elif totals["num_packed"]:
        payload = format_size(totals["packed_nbytes"])
        method = facts["quant_method"] or "announced by nothing"
        lines.append(f"{totals['num_packed']} FP8 weights, {payload}: {method}; not by fp8pack: there is no manifest")
    else:
        lines.append("not packed: no tensor is FP8")
    if totals["sqnr_min"] is not None:
        lines.append(
            f"SQNR mean {totals['sqnr_mean']:.2f}, worst {totals['sqnr_min']:.2f} dB in {totals['sqnr_worst_tensor']}"
        )
    return lines
