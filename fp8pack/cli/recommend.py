"""`fp8pack recommend`."""

import os
from pathlib import Path
from typing import Annotated

import typer

from fp8pack.cli import options
from fp8pack.cli.output import show
from fp8pack.quiet import quiet_imports


def recommend(
    model: Annotated[Path, typer.Argument(help="Directory, or repository in the hub cache.", show_default=False)],
    targets: options.Targets = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            "--calibration",
            metavar="FILE",
            help="For static activations and, with second moments, compensated rounding",
        ),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option("--text", metavar="PATH|NAME", help="Held-out text, as for `fp8pack eval` [default: held-out]"),
    ] = None,
    text_column: Annotated[
        str | None, typer.Option("--text-column", metavar="NAME", help="Column with the text")
    ] = None,
    num_tokens: Annotated[
        str | None, typer.Option("--num-tokens", metavar="N", help="At most so many tokens of text [default: 4096]")
    ] = None,
    max_length: Annotated[
        str | None, typer.Option("--max-length", metavar="N", help="Tokens of a window [default: the model's limit]")
    ] = None,
    device: Annotated[str, typer.Option("--device", metavar="NAME", help="auto, cpu or cuda")] = "auto",
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Pack a model by every scheme that the targets load, measure each, and say which to take.

    Nothing is kept: each is packed into a temporary directory beside the model. The last line is the command that packs
    the one to take.
    """
    from fp8pack.evaluation.options import LAYER_TOKENS, EvalOptions
    from fp8pack.inputs import parse_texts

    given = EvalOptions(
        text=text or (),
        text_column=text_column,
        num_tokens=LAYER_TOKENS if num_tokens is None else num_tokens,
        max_length=max_length,
        device=device,
    )  # a wrong value is refused before torch is imported
    engines = parse_texts("targets", targets or (), commas=True)
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # torch's threads spin, and starve all others on a shared machine
    with quiet_imports():
        from fp8pack.evaluation.recommend import run_recommend  # torch, transformers: seconds
    from fp8pack.report.progress import EVALUATING, showing_progress
    from fp8pack.report.recommendation import print_recommendation

    with showing_progress(EVALUATING, quiet) as on_progress:
        found = run_recommend(model, engines, calibration, given, on_progress)
    show(found, print_recommendation, as_json=as_json)
