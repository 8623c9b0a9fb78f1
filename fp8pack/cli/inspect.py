"""`fp8pack inspect`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from fp8pack.cli.output import emit


def inspect(
    checkpoint: Annotated[
        Path,
        typer.Argument(help="A directory or a .safetensors file, packed or not, or a calibration.", show_default=False),
    ],
    against: Annotated[
        Path | None, typer.Option(metavar="SOURCE", help="What it was packed from: measures the SQNR of every weight.")
    ] = None,
    fail_if: Annotated[
        list[str] | None, typer.Option(metavar="BOUND", help="Exit with 8 if it holds, such as 'sqnr_min<28'.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Show what a checkpoint holds, tensor by tensor, or a calibration, site by site."""
    from fp8pack.packing import inspect as inspection  # imports NumPy and LLVM, which --help must not wait for
    from fp8pack.report.calibration import print_calibration
    from fp8pack.report.table import print_inspection

    bounds = [inspection.parse_bound(text) for text in fail_if or ()]
    facts = inspection.inspect(checkpoint, against)
    if as_json:
        emit(json.dumps(facts, indent=2, ensure_ascii=False))
    elif "calibration" in facts:
        print_calibration(facts)
    else:
        print_inspection(facts)
    inspection.check_bounds(facts, bounds)
