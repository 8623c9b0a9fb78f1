"""What `env` prints: versions, and for every device a table of GEMM backends."""

from collections.abc import Iterable

from rich.table import Table

from fp8pack.report.console import make_console, print_line
from fp8pack.runtime.environment import Environment, GemmSupport

_ACTIVATIONS = {"tensor": "per tensor", "channel": "per token", "group:128": "1x128", "mx": "MX 1x32"}


def print_environment(found: Environment) -> None:
    """Print an environment to stdout."""
    console = make_console([])
    print_line(console, f"fp8pack {found.fp8pack}  Python {found.python}  {found.platform}")
    versions = (f"{name} {version or 'not installed'}" for name, version in found.packages.items())
    print_line(console, "  ".join(versions))
    toolkit = f"CUDA {found.cuda}" if found.cuda else f"ROCm {found.rocm}" if found.rocm else ""
    print_line(console, f"torch is built for {toolkit or 'CPUs alone'}; {_count(len(found.devices) - 1)}")
    for device in found.devices:
        print_line(console, "")
        print_line(console, "  ".join(part for part in (device.device, device.name, device.capability) if part))
        console.print(_table(device.gemms))


def _count(gpus: int) -> str:
    return "no GPU" if gpus == 0 else f"{gpus} GPU{'s' if gpus > 1 else ''}"


def _table(gemms: Iterable[GemmSupport]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for header in ("weight scales", "activations", "backend", "other backends"):
        table.add_column(header, overflow="fold")
    for gemm in gemms:
        activations = "not quantized" if gemm.activations is None else _ACTIVATIONS[gemm.activations]
        others = [f"{name}: {problem or 'also works'}" for name, problem in gemm.tried.items() if name != gemm.backend]
        table.add_row(gemm.granularity, activations, gemm.backend or "none", "; ".join(others))
    return table
