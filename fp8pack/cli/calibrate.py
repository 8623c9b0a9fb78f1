"""`fp8pack calibrate`."""

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from fp8pack.cli.output import emit, say
from fp8pack.units import parse_duration

_PROMPTS, _RUNNING, _OUTPUT = "Prompts", "Running", "What is printed"


def calibrate(
    model: Annotated[
        Path, typer.Argument(help="A directory, or the id of a repository in the hub cache.", show_default=False)
    ],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="By default MODEL-calibration.safetensors beside MODEL."),
    ] = None,
    prompts: Annotated[
        str,
        typer.Option(
            metavar="PATH|NAME",
            help="built-in, a JSONL, Parquet, CSV or text file, or a data set in the hub cache.",
            rich_help_panel=_PROMPTS,
        ),
    ] = "built-in",
    num_prompts: Annotated[
        int, typer.Option(min=1, help="How many; 128 to 512 are usual.", rich_help_panel=_PROMPTS)
    ] = 256,
    max_length: Annotated[
        int | None,
        typer.Option(
            min=1, help="Tokens of a prompt; by default the model's limit, 2048 at most.", rich_help_panel=_PROMPTS
        ),
    ] = None,
    batch_size: Annotated[
        int,
        typer.Option(
            min=1,
            help="Prompts in a call; more are padded, which changes the statistics a little.",
            rich_help_panel=_RUNNING,
        ),
    ] = 1,
    all_experts: Annotated[
        bool,
        typer.Option(
            "--all-experts",
            help="Also run every token through every expert, for those rarely routed to.",
            rich_help_panel=_RUNNING,
        ),
    ] = False,
    until_converged: Annotated[
        bool,
        typer.Option(
            "--until-converged",
            help="Stop when no amax has grown by more than 1 % over 64 prompts.",
            rich_help_panel=_RUNNING,
        ),
    ] = False,
    stream_layers: Annotated[
        str,
        typer.Option(
            help="on, off or auto: read one layer at a time; auto if the weights exceed half of the free memory.",
            rich_help_panel=_RUNNING,
        ),
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.", rich_help_panel=_RUNNING)] = "auto",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that lies in MODEL.", rich_help_panel=_RUNNING)
    ] = False,
    resume: Annotated[
        bool, typer.Option(help="Go on with an unfinished calibration.", rich_help_panel=_RUNNING)
    ] = True,
    deadline: Annotated[
        str | None,
        typer.Option(
            metavar="TIME", help="Stop cleanly after 50m, 2h, …; the same command continues.", rich_help_panel=_RUNNING
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an output that exists.", rich_help_panel=_RUNNING)
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON document on stdout.", rich_help_panel=_OUTPUT)
    ] = False,
    quiet: Annotated[
        bool, typer.Option("-q", "--quiet", help="Nothing but errors on stderr.", rich_help_panel=_OUTPUT)
    ] = False,
) -> None:
    """Run a model in BF16 over prompts and keep statistics of its activations, for static and KV-cache scales."""
    from fp8pack.calibration.options import CalibrateOptions

    options = CalibrateOptions(
        output=output,
        prompts=prompts,
        num_prompts=num_prompts,
        max_length=max_length,
        batch_size=batch_size,
        all_experts=all_experts,
        until_converged=until_converged,
        stream_layers=stream_layers,
        device=device,
        trust_remote_code=trust_remote_code,
        resume=resume,
        overwrite=overwrite,
        deadline_seconds=parse_duration(deadline) if deadline else None,
    )
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # torch's threads spin, and starve all others on a shared machine
    from fp8pack.calibration.calibrate import calibrate as run  # imports torch and transformers, which take seconds
    from fp8pack.report.calibration import summary_lines
    from fp8pack.report.progress import CALIBRATING, print_above, showing_progress

    with showing_progress(CALIBRATING, quiet) as on_progress:
        facts = run(model, options, on_progress=on_progress, on_note=(lambda note: None) if quiet else print_above)
    if not quiet:
        say(*summary_lines(facts))
    emit(json.dumps(facts, indent=2, ensure_ascii=False) if as_json else facts["output"])
