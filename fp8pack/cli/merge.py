"""`fp8pack merge`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from fp8pack.cli.output import emit, say


def merge(
    calibrations: Annotated[
        list[Path], typer.Argument(metavar="A B ...", help="Calibration files of one model.", show_default=False)
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Where to write.", show_default=False)],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Nothing but errors on stderr.")] = False,
) -> None:
    """Join calibrations that were made from different prompts, on different machines say."""
    from fp8pack.calibration.merge import merge as join  # imports NumPy and pydantic, which --help must not wait for
    from fp8pack.report.calibration import summary_lines

    facts = join(calibrations, output, overwrite=overwrite)
    if not quiet:
        say(*summary_lines(facts))
    emit(json.dumps(facts, indent=2, ensure_ascii=False) if as_json else facts["output"])
