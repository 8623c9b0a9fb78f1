"""`fp8pack eval`."""

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from fp8pack.cli import options
from fp8pack.cli.output import check_output, show
from fp8pack.errors import RecipeError
from fp8pack.quiet import quiet_imports

_RUNNING = "Running"


def _running(*flags: str, help: str, metavar: str | None = None) -> Any:
    return typer.Option(*flags, help=help, metavar=metavar, rich_help_panel=_RUNNING)


def _check_sensitivity(output: Path, *, is_measured: bool) -> None:
    if not is_measured:
        raise RecipeError("only what layers or linears cost is written", "add --per-linear, or leave out --output")
    if output.suffix != ".json" or output.is_dir():
        raise RecipeError(
            f"output {str(output)!r} does not end in .json", "an existing .json is replaced, nothing else"
        )


def evaluate(
    checkpoints: Annotated[
        list[Path], typer.Argument(metavar="CHECKPOINT", help="Checkpoints of one source.", show_default=False)
    ],
    against: Annotated[
        Path,
        typer.Option("--against", metavar="SOURCE", help="The checkpoint they were packed from", show_default=False),
    ],
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text",
            metavar="PATH|NAME",
            help="held-out, a JSONL, Parquet, CSV or text file, or a data set in the hub cache; repeat to add "
            "[default: held-out]",
        ),
    ] = None,
    text_column: Annotated[
        str | None, typer.Option("--text-column", metavar="NAME", help="Column with the text")
    ] = None,
    num_tokens: Annotated[
        str | None,
        typer.Option(
            "--num-tokens",
            metavar="N",
            help="At most so many tokens of text [default: 32768; 4096 with --per-layer]",
        ),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option("--max-length", metavar="N", help="Tokens of a window [default: the model's limit, at most 2048]"),
    ] = None,
    activations: Annotated[
        str,
        typer.Option(
            "--activations",
            metavar="NAME",
            help="Inputs of FP8 linears: declared (by the checkpoint), none, dynamic or static",
        ),
    ] = "declared",
    dtype: Annotated[str, _running("--dtype", metavar="NAME", help="Of all else: float32 or bfloat16")] = "float32",
    device: Annotated[str, _running("--device", metavar="NAME", help="auto, cpu or cuda")] = "auto",
    trust_remote_code: Annotated[
        bool, _running("--trust-remote-code", help="Allow custom modeling code from the checkpoint")
    ] = False,
    stream_layers: Annotated[
        str,
        _running("--stream-layers", metavar="NAME", help="One layer in memory at a time: on, off, or auto, if large"),
    ] = "auto",
    base: Annotated[
        Path | None, _running("--base", metavar="FILE", help="The source's last hidden states, of --save-base")
    ] = None,
    save_base: Annotated[
        Path | None,
        _running("--save-base", metavar="FILE", help="Write them, to compare more checkpoints with the source later"),
    ] = None,
    state: Annotated[
        Path | None,
        _running("--state", metavar="DIR", help="Keep finished layers here; the same command continues after a stop"),
    ] = None,
    deadline: Annotated[
        str | None, _running("--deadline", metavar="TIME", help="Stop after this time, such as 50m; needs --state")
    ] = None,
    per_layer: Annotated[
        bool, typer.Option("--per-layer", help="What each decoder layer costs: one at a time in FP8, 4,096 tokens")
    ] = False,
    per_linear: Annotated[bool, typer.Option("--per-linear", help="The same for each linear: takes longer")] = False,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="Write what each layer or linear costs, for pack --keep"),
    ] = None,
    fail_if: Annotated[
        list[str] | None,
        typer.Option("--fail-if", metavar="CONDITION", help="Exit with code 8 when it is true, e.g. 'kl>0.01'"),
    ] = None,
    fail_on: Annotated[
        str, typer.Option("--fail-on", metavar="NAME", help="Judge the worse end of the 95 % interval, or the point")
    ] = "interval",
    html: options.Html = None,
    as_markdown: options.AsMarkdown = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure what FP8 cost: run checkpoints and their source over the same text.

    Prints perplexity, KL divergence and agreement of the next-token distributions, with 95 % intervals over documents,
    and where they differ most. Of an encoder: cosines, rank correlation and neighbours of embeddings; of a classifier:
    agreement.
    """
    from fp8pack.bounds import parse_bounds
    from fp8pack.evaluation.options import FAIL_ON, LAYER_TOKENS, EvalOptions
    from fp8pack.inputs import parse_choice

    given = EvalOptions(
        text=text or (),
        text_column=text_column,
        num_tokens=LAYER_TOKENS if num_tokens is None and (per_layer or per_linear) else num_tokens,
        max_length=max_length,
        activations=activations,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        stream_layers=stream_layers,
        base=base,
        save_base=save_base,
        state=state,
        deadline=deadline,
    )  # a wrong value is refused before torch is imported
    check_output(html, as_json=as_json, as_markdown=as_markdown)
    if (per_layer or per_linear) and (len(checkpoints) > 1 or fail_if or base or save_base):
        sentence = "layers are measured of one checkpoint, without bounds and base"
        raise RecipeError(sentence, "name one, and leave out --fail-if, --base and --save-base")
    if output is not None:
        _check_sensitivity(output, is_measured=per_layer or per_linear)
    found_on = parse_choice("fail_on", fail_on, FAIL_ON)
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # torch's threads spin, and starve all others on a shared machine
    with quiet_imports():
        from fp8pack.evaluation import evaluate, evaluate_encoder, evaluate_layers  # torch, transformers: seconds
    from fp8pack.checkpoint.shard_writer import replace_file
    from fp8pack.checkpoint.source import open_checkpoint
    from fp8pack.report.evaluation import print_encoder_evaluation, print_evaluation, print_layer_evaluation
    from fp8pack.report.progress import EVALUATING, showing_progress

    if per_layer or per_linear:
        by = "linear" if per_linear else "layer"
        with showing_progress(EVALUATING, quiet) as on_progress:
            layers = evaluate_layers.run_layers(checkpoints[0], against, by, given, on_progress)
        if output is not None:
            replace_file(output, (json.dumps(layers.to_dict(), indent=2) + "\n").encode())
        show(layers, print_layer_evaluation, as_json=as_json, as_markdown=as_markdown, html=html)
        return
    is_encoder = bool(evaluate_encoder.kind_of(open_checkpoint(against)))
    bounds = parse_bounds(fail_if or (), evaluate_encoder.METRICS if is_encoder else evaluate.METRICS)
    with showing_progress(EVALUATING, quiet) as on_progress:
        if is_encoder:
            encoded = evaluate_encoder.run_encoders(checkpoints, against, given, on_progress)
        else:
            found = evaluate.run_evaluation(checkpoints, against, given, on_progress)
    if is_encoder:
        show(encoded, print_encoder_evaluation, as_json=as_json, as_markdown=as_markdown, html=html)
        evaluate_encoder.check_bounds(encoded, bounds, found_on)
    else:
        show(found, print_evaluation, as_json=as_json, as_markdown=as_markdown, html=html)
        evaluate.check_bounds(found, bounds, found_on)
