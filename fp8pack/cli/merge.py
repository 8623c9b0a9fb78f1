"""`fp8pack merge`."""

from pathlib import Path
from typing import Annotated

import typer

from fp8pack.cli import options
from fp8pack.cli.output import emit, emit_document, say


def merge(
    calibrations: Annotated[
        list[Path], typer.Argument(metavar="A B ...", help="Calibration files of one model.", show_default=False)
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="PATH", help="Output file", show_default=False)],
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Merge calibration files made from different prompts."""
    from fp8pack.calibration.merge import merge as join  # imports NumPy and pydantic, not needed for --help
    from fp8pack.report.calibration import summary_lines

    summary = join(calibrations, output, overwrite=overwrite)
    if not quiet:
        say(*summary_lines(summary))
    emit_document(summary) if as_json else emit(str(summary.output))
