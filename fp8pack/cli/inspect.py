"""`fp8pack inspect`."""

from pathlib import Path
from typing import Annotated

import typer

from fp8pack.cli import options
from fp8pack.cli.output import emit_document, printing
from fp8pack.engines.known import NAMES, parse_targets


def inspect(
    checkpoint: Annotated[
        Path, typer.Argument(help="Checkpoint, FP8 or not, or a calibration file.", show_default=False)
    ],
    against: Annotated[
        Path | None, typer.Option(metavar="SOURCE", help="Measure the SQNR of every FP8 weight against its source")
    ] = None,
    fail_if: options.FailIf = None,
    targets: Annotated[
        list[str] | None,
        typer.Option(
            "--target",
            "--targets",
            metavar="ENGINE,...",
            help="Exit with code 8 unless these engines load it",
            autocompletion=options.completing(tuple(NAMES)),
        ),
    ] = None,
    tp: Annotated[str | None, typer.Option(metavar="N", help="Tensor-parallel size to check")] = None,
    gpu: Annotated[str | None, typer.Option(metavar="NAME", help="GPU to check, e.g. h100, b200 or mi300x")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Show the tensors of a checkpoint and which engines load it."""
    from fp8pack.checkpoint.calibration_file import is_calibration  # imports NumPy and LLVM, not needed for --help
    from fp8pack.inputs import parse_texts
    from fp8pack.reading.bounds import check_bounds, check_targets, parse_bounds
    from fp8pack.reading.inspect import inspect_calibration, look
    from fp8pack.report.calibration import print_calibration
    from fp8pack.report.table import print_inspection

    bounds = parse_bounds(fail_if or ())
    asked = parse_targets(parse_texts("targets", targets or (), commas=True))
    if against is None and checkpoint.is_file() and is_calibration(checkpoint):
        summary = inspect_calibration(checkpoint)
        if as_json:
            emit_document(summary)
        else:
            with printing():
                print_calibration(summary)
        return
    found = look(checkpoint, against, targets=asked, tp=tp, gpu=gpu)
    if as_json:
        emit_document(found)
    else:
        with printing():
            print_inspection(found, asked)
    check_bounds(found, bounds)
    check_targets(found, asked)
