"""`fp8pack env`."""

from pathlib import Path
from typing import Annotated

import typer

from fp8pack.cli import options
from fp8pack.cli.output import emit, emit_document, printing
from fp8pack.quiet import quiet_imports

_INCLUDE = Path(__file__).parents[1] / "_data" / "include"


def env(
    include_dir: Annotated[
        bool,
        typer.Option("--include-dir", help="Print the folder of fp8pack.hpp, for a C++ compiler."),
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Show versions, devices, and which backend runs FP8 GEMMs.

    Each backend is verified with a small GEMM.
    """
    if include_dir:
        emit(str(_INCLUDE))
        return
    from fp8pack.report.environment import print_environment

    with quiet_imports():
        from fp8pack.runtime.environment import environment  # imports torch, which --help must not wait for

    found = environment()
    if as_json:
        emit_document(found)
    else:
        with printing():
            print_environment(found)
