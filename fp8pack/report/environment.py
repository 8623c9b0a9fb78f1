"""What `env` shows: versions in a line each, and for every device a table of back ends."""

from typing import Any

from rich.table import Table

from fp8pack.report.table import make_console, print_line

_ACTIVATIONS = {"tensor": "per tensor", "channel": "per token", "group:128": "1x128", "mx": "MX 1x32"}


def print_environment(facts: dict[str, Any]) -> None:
    """Print the facts of a machine to stdout."""
    console = make_console([])
    print_line(console, f"fp8pack {facts['fp8pack']}  Python {facts['python']}  {facts['platform']}")
    versions = (f"{name} {version or 'not installed'}" for name, version in facts["packages"].items())
    print_line(console, "  ".join(versions))
    toolkit = f"CUDA {facts['cuda']}" if facts["cuda"] else f"ROCm {facts['rocm']}" if facts["rocm"] else ""
    print_line(console, f"torch is built for {toolkit or 'CPUs alone'}; {_count(facts['devices'])}")
    for device in facts["devices"]:
        print_line(console, "")
        heading = (device["device"], device["name"], device["capability"])
        print_line(console, "  ".join(part for part in heading if part))
        console.print(_table(device["products"]))


def _count(devices: list[dict[str, Any]]) -> str:
    gpus = len(devices) - 1
    return "no GPU" if gpus == 0 else f"{gpus} GPU{'s' if gpus > 1 else ''}"


def _table(products: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for header in ("weight scales", "activations", "back end", "the others"):
        table.add_column(header, overflow="fold")
    for product in products:
        others = [
            f"{name}: {problem or 'would serve'}"
            for name, problem in product["tried"].items()
            if name != product["back_end"]
        ]
        activations = _ACTIVATIONS.get(product["activations"], "not quantized")
        table.add_row(product["granularity"], activations, product["back_end"] or "none", "; ".join(others))
    return table
