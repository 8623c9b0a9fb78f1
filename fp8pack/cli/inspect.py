"""`fp8pack inspect`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fp8pack.cli import options
from fp8pack.cli.output import check_output, show
from fp8pack.engines.known import NAMES, parse_targets
from fp8pack.errors import RecipeError

if TYPE_CHECKING:
    from fp8pack.reading.inspection import Inspection

_SHOWING = "Tensors"


def inspect(
    checkpoint: Annotated[
        Path, typer.Argument(help="Checkpoint, FP8 or not, or a calibration file.", show_default=False)
    ],
    tensor: Annotated[
        str | None, typer.Argument(help="One tensor: its values and scales as histograms.", show_default=False)
    ] = None,
    against: Annotated[
        Path | None, typer.Option(metavar="SOURCE", help="Compare every FP8 weight with its source")
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            "--calibration",
            metavar="FILE",
            help="Predict what each output loses; of a source, by format and granularity",
        ),
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
    ep: Annotated[str | None, typer.Option(metavar="N", help="Groups of GPUs among which experts are divided")] = None,
    gpu: Annotated[str | None, typer.Option(metavar="NAME", help="GPU to check, e.g. h100, b200 or mi300x")] = None,
    tensors: Annotated[
        bool, typer.Option("-v", "--tensors", help="List every tensor", rich_help_panel=_SHOWING)
    ] = False,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="List these tensors, e.g. '*.o_proj'", rich_help_panel=_SHOWING),
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CONDITION", help="List those for which it is true, e.g. 'sqnr<30'", rich_help_panel=_SHOWING
        ),
    ] = None,
    sort: Annotated[
        str,
        typer.Option(
            metavar="ORDER",
            help="Of the list: name, sqnr (worst first), scale or size (largest first)",
            autocompletion=options.completing(("name", "sqnr", "scale", "size")),
            rich_help_panel=_SHOWING,
        ),
    ] = "name",
    explain: Annotated[
        bool,
        typer.Option(
            "--explain",
            help="Of one tensor: what every other format and granularity would cost",
            rich_help_panel=_SHOWING,
        ),
    ] = False,
    html: options.Html = None,
    as_markdown: options.AsMarkdown = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Show what a checkpoint is, what FP8 cost its weights, and which engines load it."""
    from fp8pack.bounds import parse_bounds
    from fp8pack.checkpoint.calibration_file import is_calibration  # imports NumPy and LLVM, not needed for --help
    from fp8pack.inputs import parse_texts
    from fp8pack.reading.bounds import INSPECTION_METRICS, check_bounds, check_targets
    from fp8pack.reading.inspect import inspect_calibration, look
    from fp8pack.reading.select import check_selection, select
    from fp8pack.report.calibration import print_calibration
    from fp8pack.report.overview import print_overview
    from fp8pack.report.progress import MEASURING, showing_progress
    from fp8pack.report.table import print_tensors

    bounds = parse_bounds(fail_if or (), INSPECTION_METRICS)
    asked = parse_targets(parse_texts("targets", targets or (), commas=True))
    check_output(html, as_json=as_json, as_markdown=as_markdown)
    check_selection(only=only or (), where=where or (), sort=sort)
    of_calibration = against is None and checkpoint.is_file() and is_calibration(checkpoint)
    predicts = calibration is not None and against is None
    if (bounds or asked) and (tensor is not None or of_calibration or predicts):
        raise RecipeError("bounds and targets are of a whole checkpoint", "leave out --fail-if and --target")
    if (html is not None or as_markdown) and (tensor is not None or predicts):
        raise RecipeError("a page or Markdown is of a whole checkpoint", "leave out --html and --markdown")
    if explain and tensor is None:
        raise RecipeError("one tensor is explained, and none is named", "name it after the checkpoint")
    if tensor is not None:
        return _show_tensor(checkpoint, tensor, against, explain=explain, as_json=as_json)
    if of_calibration:
        summary = inspect_calibration(checkpoint)
        return show(summary, print_calibration, as_json=as_json, as_markdown=as_markdown, html=html)
    if calibration is not None and predicts:
        return _show_predictions(checkpoint, calibration, quiet=quiet, as_json=as_json)
    with showing_progress(MEASURING, quiet) as on_progress:
        found = look(
            checkpoint, against, targets=asked, tp=tp, ep=ep, gpu=gpu, calibration=calibration, on_progress=on_progress
        )
    listed = tensors or bool(only) or bool(where) or sort != "name"
    shown = select(found, only=only or (), where=where or (), sort=sort)

    def print_found(found: "Inspection") -> None:
        if listed:
            print_tensors(shown)
            print()
        print_overview(found, asked, brief=listed)

    show(found, print_found, as_json=as_json, as_markdown=as_markdown, html=html)
    found.check()
    check_bounds(found, bounds)
    check_targets(found, asked)


def _show_tensor(checkpoint: Path, tensor: str, against: Path | None, *, explain: bool, as_json: bool) -> None:
    from fp8pack.reading.tensor_detail import inspect_tensor
    from fp8pack.report.tensor import print_tensor

    found = inspect_tensor(checkpoint, tensor, against, explain=explain)
    show(found, print_tensor, as_json=as_json)
    found.check()


def _show_predictions(source: Path, calibration: Path, *, quiet: bool, as_json: bool) -> None:
    from fp8pack.reading.predict import predict_outputs
    from fp8pack.report.predictions import print_predictions
    from fp8pack.report.progress import MEASURING, showing_progress

    with showing_progress(MEASURING, quiet) as on_progress:
        found = predict_outputs(source, calibration, on_progress=on_progress)
    show(found, print_predictions, as_json=as_json)
