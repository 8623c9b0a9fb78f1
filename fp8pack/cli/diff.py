"""`fp8pack diff`."""

from pathlib import Path
from typing import Annotated

import typer

from fp8pack.cli import options
from fp8pack.cli.output import emit_document, printing


def diff(
    a: Annotated[Path, typer.Argument(help="Checkpoint, FP8 or not.", show_default=False)],
    b: Annotated[Path, typer.Argument(help="Checkpoint to compare with it.", show_default=False)],
    fail_if: options.FailIf = None,
    as_json: options.AsJson = False,
) -> None:
    """Compare two checkpoints tensor by tensor.

    Prints formats, scales, the share of equal bytes, and the SQNR of B's values against A's.
    """
    from fp8pack.bounds import parse_bounds
    from fp8pack.reading.bounds import COMPARISON_METRICS, check_bounds  # imports NumPy and LLVM, not needed for --help
    from fp8pack.reading.diff import compare
    from fp8pack.report.diff import print_diff

    bounds = parse_bounds(fail_if or (), COMPARISON_METRICS)
    found = compare(a, b)
    if as_json:
        emit_document(found)
    else:
        with printing():
            print_diff(found)
    found.check()
    check_bounds(found, bounds)
