"""`fp8pack inspect`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from fp8pack.cli import options
from fp8pack.cli.output import emit, printing


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
    target: Annotated[
        list[str] | None, typer.Option(metavar="ENGINE", help="Exit with 8 unless it loads the checkpoint.")
    ] = None,
    tp: Annotated[int | None, typer.Option(min=1, max=1024, help="At this tensor-parallel size.")] = None,
    gpu: Annotated[str | None, typer.Option(help="On this GPU, such as h100, b200 or mi300x.")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Show what a checkpoint of any convention holds, and who loads it; or a calibration, site by site."""
    from fp8pack.reading import inspect as inspection  # imports NumPy and LLVM, which --help must not wait for
    from fp8pack.report.calibration import print_calibration
    from fp8pack.report.table import print_inspection

    bounds = [inspection.parse_bound(text) for text in fail_if or ()]
    facts = inspection.inspect(checkpoint, against, targets=target or (), tp=tp, gpu=gpu)
    if as_json:
        emit(json.dumps(facts, indent=2, ensure_ascii=False))
    elif "calibration" in facts:
        with printing():
            print_calibration(facts)
    else:
        with printing():
            print_inspection(facts)
    inspection.check_bounds(facts, bounds)
    inspection.check_targets(facts)
