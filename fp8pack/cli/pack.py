"""`fp8pack pack`."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from fp8pack.cli.output import emit, say
from fp8pack.errors import RecipeError
from fp8pack.numerics.formats import parse_format
from fp8pack.numerics.granularity import parse_granularity
from fp8pack.numerics.scaling import ScaleRounding
from fp8pack.planning.engines import parse_targets
from fp8pack.planning.patterns import Pattern
from fp8pack.planning.recipe import MAX_MARGIN, Request
from fp8pack.units import parse_duration, parse_size

Flags = dict[str, Any]
_RECIPE, _WRITING, _OUTPUT = "Recipe", "Writing", "What is printed"


def pack(
    model: Annotated[
        Path,
        typer.Argument(
            help="A directory, a .safetensors file, or the id of a repository in the hub cache.", show_default=False
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Where to write; by default beside MODEL, named after the scheme."),
    ] = None,
    scheme: Annotated[
        str, typer.Option(help="auto, FP8_BLOCK, FP8_DYNAMIC, FP8, MXFP8 or W8A16.", rich_help_panel=_RECIPE)
    ] = "auto",
    format: Annotated[str | None, typer.Option(help="e4m3 or e5m2.", rich_help_panel=_RECIPE)] = None,
    granularity: Annotated[
        str | None, typer.Option(help="tensor, channel, group:G, block:RxC or mx.", rich_help_panel=_RECIPE)
    ] = None,
    quant_method: Annotated[
        str | None, typer.Option(help="fp8, compressed-tensors, modelopt or fp8pack.", rich_help_panel=_RECIPE)
    ] = None,
    scale_rounding: Annotated[str | None, typer.Option(help="none, up or floor.", rich_help_panel=_RECIPE)] = None,
    activations: Annotated[str | None, typer.Option(help="dynamic, static or none.", rich_help_panel=_RECIPE)] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Of fp8pack calibrate: for static activations.", rich_help_panel=_RECIPE),
    ] = None,
    kv_cache: Annotated[
        bool,
        typer.Option("--kv-cache", help="Add the calibrated scales of K and V.", rich_help_panel=_RECIPE),
    ] = False,
    percentile: Annotated[
        float | None,
        typer.Option(
            min=1e-9, max=100, help="Of activations, instead of amax; mostly costs accuracy.", rich_help_panel=_RECIPE
        ),
    ] = None,
    margin: Annotated[
        int,
        typer.Option(
            min=-MAX_MARGIN,
            max=MAX_MARGIN,
            help="Activation scales are multiplied by 2^margin.",
            rich_help_panel=_RECIPE,
        ),
    ] = 0,
    warmup: Annotated[
        int,
        typer.Option(min=0, help="Leave the first prompts out of amax and history.", rich_help_panel=_RECIPE),
    ] = 0,
    recipe: Annotated[
        Path | None, typer.Option(help="A recipe in YAML; flags overrule it.", rich_help_panel=_RECIPE)
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option("--ignore", "--exclude", metavar="PATTERN", help="Stays as it is.", rich_help_panel=_RECIPE),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Nothing else is packed.", rich_help_panel=_RECIPE)
    ] = None,
    pack_too: Annotated[
        list[str] | None,
        typer.Option("--pack", metavar="PATTERN", help="Packed whatever the policy says.", rich_help_panel=_RECIPE),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ENGINE",
            help="Must load the output: vllm, sglang, tensorrt-llm, transformers, tgi, lmdeploy.",
            rich_help_panel=_RECIPE,
        ),
    ] = None,
    tp: Annotated[
        int | None,
        typer.Option(min=1, max=1024, help="Tensor-parallel size that it must load at.", rich_help_panel=_RECIPE),
    ] = None,
    copy: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Side files to bring along although a rule leaves them out.",
            rich_help_panel=_WRITING,
        ),
    ] = None,
    max_shard_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Such as 5GB; by default the source's shards, one for one.", rich_help_panel=_WRITING
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, max=4096, help="Threads; by default as many as cores.", rich_help_panel=_WRITING),
    ] = None,
    max_memory: Annotated[
        str, typer.Option(metavar="SIZE", help="Memory budget, which bounds the threads.", rich_help_panel=_WRITING)
    ] = "256MiB",
    device: Annotated[str, typer.Option(help="cpu or cuda; the bytes are the same.", rich_help_panel=_WRITING)] = "cpu",
    resume: Annotated[bool, typer.Option(help="Go on with an unfinished pack.", rich_help_panel=_WRITING)] = True,
    deadline: Annotated[
        str | None,
        typer.Option(
            metavar="TIME", help="Stop cleanly after 50m, 2h, …; the same command continues.", rich_help_panel=_WRITING
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an output that exists.", rich_help_panel=_WRITING)
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done, and stop.", rich_help_panel=_OUTPUT)
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON document on stdout.", rich_help_panel=_OUTPUT)
    ] = False,
    quiet: Annotated[
        bool, typer.Option("-q", "--quiet", help="Nothing but errors on stderr.", rich_help_panel=_OUTPUT)
    ] = False,
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="A line for every tensor.", rich_help_panel=_OUTPUT)
    ] = False,
) -> None:
    """Write an FP8 checkpoint from a BF16, FP16 or FP32 one.

    A PATTERN is an exact tensor or module name, a glob over the whole name, or re: and a regular expression; one that
    matches nothing is an error unless ? stands before it.
    """
    from fp8pack.packing.facts import pack_facts  # these import NumPy and BLAKE3, which --help must not wait for
    from fp8pack.packing.pack import carry_out
    from fp8pack.packing.prepare import WriteOptions, prepare
    from fp8pack.report.progress import PACKING, showing_progress
    from fp8pack.report.summary import plan_lines, result_lines

    flags = {
        "scheme": scheme if scheme != "auto" else None,
        "format": parse_format(format) if format else None,
        "granularity": parse_granularity(granularity) if granularity else None,
        "quant_method": quant_method,
        "scale_rounding": _parse_rounding(scale_rounding),
        "activations": _parse_activations(activations),
        "calibration": calibration,
        "kv_cache": kv_cache,
        "percentile": percentile,
        "margin": margin,
        "warmup": warmup,
        "ignore": _patterns(ignore),
        "only": _patterns(only),
        "pack": _patterns(pack_too),
        "targets": parse_targets(target or []),
        "tp": tp,
    }
    options = WriteOptions(
        output=output,
        workers=workers,
        max_memory=parse_size(max_memory),
        max_shard_nbytes=parse_size(max_shard_size) if max_shard_size else None,
        device=device,
        copy=tuple(copy or ()),
        resume=resume,
        overwrite=overwrite,
        deadline_seconds=parse_duration(deadline) if deadline else None,
    )
    prepared = prepare(model, _make_request(recipe, flags), options)
    if not quiet:
        say(*plan_lines(pack_facts(prepared, every_tensor=verbose)))
    result = None
    if not dry_run:
        with showing_progress(PACKING, quiet) as on_progress:
            result = carry_out(prepared, on_progress)
    facts = pack_facts(prepared, result, every_tensor=dry_run and as_json)
    if not quiet:
        say(*result_lines(facts))
    if as_json:
        emit(json.dumps(facts, indent=2, ensure_ascii=False))
    elif not dry_run:
        emit(facts["output"])


def _make_request(recipe: Path | None, flags: Flags) -> Request:
    request = Request()
    if recipe is not None:
        from fp8pack.planning.recipe_file import parse_recipe  # pydantic and YAML, for this flag only

        try:
            request = parse_recipe(recipe.read_text(encoding="utf-8"), recipe.name)
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"{recipe} cannot be read: {error}") from None
    return replace(request, **{name: value for name, value in flags.items() if value})


def _patterns(texts: list[str] | None) -> tuple[Pattern, ...]:
    return tuple(map(Pattern, texts or ()))


def _parse_rounding(text: str | None) -> ScaleRounding | None:
    if text is None or text.lower() in set(ScaleRounding):
        return None if text is None else ScaleRounding(text.lower())
    raise RecipeError(f"--scale-rounding {text!r} is not known: choose none, up or floor")


def _parse_activations(text: str | None) -> str | None:
    if text is None or text.lower() in ("dynamic", "static", "none"):
        return text.lower() if text else None
    raise RecipeError(f"--activations {text!r} is not known: choose dynamic, static or none")
