"""`fp8pack calibrate`."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from fp8pack.cli import options
from fp8pack.cli.output import emit, emit_document, say
from fp8pack.quiet import quiet_imports


def _prompts(*flags: str, help: str, metavar: str) -> Any:
    return typer.Option(*flags, help=help, metavar=metavar, rich_help_panel="Prompts")


def _running(*flags: str, help: str, metavar: str | None = None) -> Any:
    return typer.Option(*flags, help=help, metavar=metavar, rich_help_panel="Running")


def calibrate(
    ctx: typer.Context,
    model: Annotated[Path, typer.Argument(help="Directory, or repository in the hub cache.", show_default=False)],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="PATH", help="Output file [default: MODEL-calibration.safetensors beside MODEL]"
        ),
    ] = None,
    prompts: Annotated[
        list[str] | None,
        _prompts(
            "--prompts",
            metavar="PATH|NAME",
            help="built-in, a JSONL, Parquet, CSV or text file, or a data set in the hub cache; repeat to mix "
            "[default: built-in]",
        ),
    ] = None,
    text_column: Annotated[
        str | None,
        _prompts("--text-column", metavar="NAME", help="Column with the text [default: text, messages, prompt, …]"),
    ] = None,
    num_prompts: Annotated[
        str, _prompts("--num-prompts", metavar="N", help="Number of prompts; use 128 to 512")
    ] = "256",
    max_length: Annotated[
        str | None,
        _prompts("--max-length", metavar="N", help="Tokens per prompt [default: the model's limit, at most 2048]"),
    ] = None,
    batch_size: Annotated[
        str,
        _running(
            "--batch-size",
            metavar="N",
            help="Prompts per forward pass; more than 1 pads, which changes statistics slightly",
        ),
    ] = "1",
    all_experts: Annotated[
        bool, _running("--all-experts", help="Also run every token through every expert, for rarely routed ones")
    ] = False,
    second_moments: Annotated[
        str,
        _running(
            "--second-moments",
            metavar="none|blocks|full",
            help="Also record X^T X of inputs, for compensated rounding; blocks: of 128 channels",
        ),
    ] = "none",
    until_converged: Annotated[
        bool, _running("--until-converged", help="Stop when no amax has grown by more than 1 % over 64 prompts")
    ] = False,
    stream_layers: Annotated[
        str,
        _running(
            "--stream-layers",
            metavar="auto|on|off",
            help="Keep one layer in memory at a time; auto: if the weights exceed half of the free memory",
        ),
    ] = "auto",
    device: Annotated[str, _running("--device", metavar="NAME", help="auto, cpu or cuda")] = "auto",
    trust_remote_code: Annotated[
        bool, _running("--trust-remote-code", help="Allow custom modeling code from the checkpoint")
    ] = False,
    resume: Annotated[bool, _running("--resume/--no-resume", help="Continue unfinished work, or discard it")] = True,
    deadline: Annotated[
        str | None,
        _running("--deadline", metavar="TIME", help="Stop after e.g. 50m or 2h; the same command continues"),
    ] = None,
    overwrite: Annotated[bool, _running("--overwrite", help="Replace an existing output")] = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Record activation statistics in BF16 for static scales.

    Runs the model over prompts and stores amax and histograms of every input activation, K and V. The file can be used
    for every format; `fp8pack merge` joins several.
    """
    from fp8pack.calibration.options import CalibrateOptions

    typed = {name: value for name, value in ctx.params.items() if name not in ("model", "as_json", "quiet")}
    typed = {name: value for name, value in typed.items() if value is not None}
    CalibrateOptions(**typed)  # a wrong value is refused before torch is imported
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # torch's threads spin, and starve all others on a shared machine
    with quiet_imports():
        from fp8pack.calibration.calibrate import calibrate as run  # imports torch and transformers: seconds
    from fp8pack.report.calibration import summary_lines
    from fp8pack.report.progress import CALIBRATING, print_above, showing_progress

    with showing_progress(CALIBRATING, quiet) as on_progress:
        on_note = (lambda note: None) if quiet else print_above
        summary = run(model, **typed, on_progress=on_progress, on_note=on_note)
    if not quiet:
        say(*summary_lines(summary))
    emit_document(summary) if as_json else emit(str(summary.output))
