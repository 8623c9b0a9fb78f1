"""`fp8pack verify`."""

from pathlib import Path
from typing import Annotated

import typer

from fp8pack.cli import options
from fp8pack.cli.output import emit_document, printing


def verify(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint of fp8pack, or of another tool.", show_default=False)],
    quick: Annotated[
        bool, typer.Option("--quick", help="Compare sizes, headers and small files; read no weight")
    ] = False,
    sample: Annotated[
        str | None, typer.Option("--sample", metavar="I/N", help="Read the I-th of N parts of the tensors, e.g. 1/20")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Files that fp8pack.json does not name differ, too")] = False,
    sha256: Annotated[
        bool, typer.Option("--sha256", help="Write SHA256SUMS, or compare with it if it is there")
    ] = False,
    against: Annotated[
        Path | None, typer.Option("--against", metavar="SOURCE", help="Pack SOURCE again, unwritten, and compare")
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option("--calibration", metavar="FILE", help="With --against: recompute scales of activations, too"),
    ] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Write what differs again, in place, from the source of --against")
    ] = False,
    recipe: Annotated[
        Path | None,
        typer.Option("--recipe", metavar="FILE", help="With --repair: the recipe, if fp8pack.json has lost it"),
    ] = None,
    root: Annotated[
        str | None,
        typer.Option("--root", metavar="DIGEST", help="With --repair: the root, if fp8pack.json has lost it"),
    ] = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Compare every byte of a checkpoint with fp8pack.json, and list what differs.

    Exits with code 6 if something does.
    """
    from fp8pack.reading.verify import verify as verify_checkpoint  # imports NumPy and LLVM, not needed for --help
    from fp8pack.report.progress import VERIFYING, showing_progress
    from fp8pack.report.verify import print_verification

    with showing_progress(VERIFYING, quiet) as on_progress:
        found = verify_checkpoint(
            checkpoint,
            quick=quick,
            sample=sample,
            strict=strict,
            sha256=sha256,
            against=against,
            calibration=calibration,
            repair=repair,
            recipe=recipe,
            root=root,
            on_progress=on_progress,
        )
    if as_json:
        emit_document(found)
    else:
        with printing():
            print_verification(found)
    found.check()
