"""`fp8pack diff`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from fp8pack.cli import options
from fp8pack.cli.output import emit, printing


def diff(
    a: Annotated[Path, typer.Argument(help="A checkpoint, FP8 or not.", show_default=False)],
    b: Annotated[Path, typer.Argument(help="Another one, of whatever convention.", show_default=False)],
    fail_if: Annotated[
        list[str] | None, typer.Option(metavar="BOUND", help="Exit with 8 if it holds, such as 'sqnr_min<28'.")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Compare two checkpoints tensor by tensor: formats, scales, equal bytes, and the SQNR of B against A."""
    from fp8pack.reading import diff as comparison  # imports NumPy and LLVM, which --help must not wait for
    from fp8pack.reading import inspect as inspection
    from fp8pack.report.diff import print_diff

    bounds = [inspection.parse_bound(text) for text in fail_if or ()]
    facts = comparison.diff(a, b)
    if as_json:
        emit(json.dumps(facts, indent=2, ensure_ascii=False))
    else:
        with printing():
            print_diff(facts)
    inspection.check_bounds(facts, bounds)
