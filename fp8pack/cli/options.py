"""Options that several commands share, each declared once; and how they become requests."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fp8pack.engines.known import parse_targets
from fp8pack.errors import RecipeError
from fp8pack.modelfacts.patterns import Pattern
from fp8pack.numerics.formats import parse_format
from fp8pack.numerics.granularity import parse_granularity
from fp8pack.numerics.scaling import ScaleRounding
from fp8pack.planning.recipe import MAX_MARGIN, WRITABLE, Request
from fp8pack.units import parse_duration, parse_size

if TYPE_CHECKING:
    from fp8pack.packing.prepare import WriteOptions

RECIPE, WRITING, OUTPUT = "Recipe", "Writing", "What is printed"

Output = Annotated[
    Path | None,
    typer.Option("-o", "--output", help="Where to write; by default beside the source, named after the result."),
]
Format = Annotated[str | None, typer.Option(help="e4m3 or e5m2.", rich_help_panel=RECIPE)]
GranularityText = Annotated[
    str | None,
    typer.Option("--granularity", help="tensor, channel, group:G, block:RxC or mx.", rich_help_panel=RECIPE),
]
QuantMethodName = Annotated[
    str | None, typer.Option("--quant-method", help=f"{', '.join(WRITABLE)}.", rich_help_panel=RECIPE)
]
Rounding = Annotated[str | None, typer.Option("--scale-rounding", help="none, up or floor.", rich_help_panel=RECIPE)]
Activations = Annotated[str | None, typer.Option(help="dynamic, static or none.", rich_help_panel=RECIPE)]
CalibrationFile = Annotated[
    Path | None,
    typer.Option(
        "--calibration", metavar="FILE", help="Of fp8pack calibrate: for static activations.", rich_help_panel=RECIPE
    ),
]
KvCache = Annotated[
    bool, typer.Option("--kv-cache", help="Add the calibrated scales of K and V.", rich_help_panel=RECIPE)
]
Percentile = Annotated[
    float | None,
    typer.Option(
        min=1e-9, max=100, help="Of activations, instead of amax; mostly costs accuracy.", rich_help_panel=RECIPE
    ),
]
Margin = Annotated[
    int,
    typer.Option(
        min=-MAX_MARGIN,
        max=MAX_MARGIN,
        help="Activation scales are multiplied by 2^margin.",
        rich_help_panel=RECIPE,
    ),
]
Warmup = Annotated[
    int, typer.Option(min=0, help="Leave the first prompts out of amax and history.", rich_help_panel=RECIPE)
]
Only = Annotated[
    list[str] | None, typer.Option(metavar="PATTERN", help="Nothing else is packed.", rich_help_panel=RECIPE)
]
PackToo = Annotated[
    list[str] | None,
    typer.Option("--pack", metavar="PATTERN", help="Packed whatever the policy says.", rich_help_panel=RECIPE),
]
Target = Annotated[
    list[str] | None,
    typer.Option(
        metavar="ENGINE",
        help="Must load the output: vllm, sglang, tensorrt-llm, transformers, tgi, lmdeploy, comfyui, cublaslt.",
        rich_help_panel=RECIPE,
    ),
]
TensorParallel = Annotated[
    int | None,
    typer.Option("--tp", min=1, max=1024, help="Tensor-parallel size that it must load at.", rich_help_panel=RECIPE),
]
GpuName = Annotated[
    str | None, typer.Option("--gpu", help="That it must run on, such as h100, b200 or mi300x.", rich_help_panel=RECIPE)
]
Copy = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN", help="Side files to bring along although a rule leaves them out.", rich_help_panel=WRITING
    ),
]
MaxShardSize = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE", help="Such as 5GB; by default the source's shards, one for one.", rich_help_panel=WRITING
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(min=1, max=4096, help="Threads; by default as many as cores.", rich_help_panel=WRITING),
]
MaxMemory = Annotated[
    str, typer.Option(metavar="SIZE", help="Memory budget, which bounds the threads.", rich_help_panel=WRITING)
]
Device = Annotated[str, typer.Option(help="cpu or cuda; the bytes are the same.", rich_help_panel=WRITING)]
Resume = Annotated[bool, typer.Option(help="Go on with unfinished work.", rich_help_panel=WRITING)]
Deadline = Annotated[
    str | None,
    typer.Option(
        metavar="TIME", help="Stop cleanly after 50m, 2h, …; the same command continues.", rich_help_panel=WRITING
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists.", rich_help_panel=WRITING)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and stop.", rich_help_panel=OUTPUT)]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.", rich_help_panel=OUTPUT)]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Nothing but errors on stderr.", rich_help_panel=OUTPUT)]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="A line for every tensor.", rich_help_panel=OUTPUT)]


def request_of(params: Mapping[str, Any]) -> Request:
    """Return what the parameters of `pack` or `convert` ask for: a recipe file, if there is one, and the flags over it.

    params: by the names of the function's parameters, as typer's context has them.
    """
    request = _read_recipe(params["recipe"]) if params.get("recipe") else Request()
    given: dict[str, Any] = {}
    for name, field in _FIELDS.items():
        value = params.get(name)
        if value and (name, value) != ("scheme", "auto"):
            given[field] = _PARSERS[name](value) if name in _PARSERS else value
    return replace(request, **given)


def write_options_of(params: Mapping[str, Any]) -> "WriteOptions":
    """Return how to write, from the parameters of a command that writes a checkpoint."""
    from fp8pack.packing.prepare import WriteOptions  # imports NumPy and BLAKE3, which --help must not wait for

    return WriteOptions(
        output=params["output"],
        workers=params["workers"],
        max_memory=parse_size(params["max_memory"]),
        max_shard_nbytes=parse_size(params["max_shard_size"]) if params["max_shard_size"] else None,
        device=params.get("device", "cpu"),
        copy=tuple(params["copy"] or ()),
        resume=params["resume"],
        overwrite=params["overwrite"],
        deadline_seconds=parse_duration(params["deadline"]) if params["deadline"] else None,
    )


def _read_recipe(path: Path) -> Request:
    from fp8pack.planning.recipe_file import parse_recipe  # pydantic and YAML, for this flag only

    try:
        return parse_recipe(path.read_text(encoding="utf-8"), path.name)
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read: {error}") from None


def _patterns(texts: list[str]) -> tuple[Pattern, ...]:
    return tuple(map(Pattern, texts))


def _parse_rounding(text: str) -> ScaleRounding:
    if text.lower() in set(ScaleRounding):
        return ScaleRounding(text.lower())
    raise RecipeError(f"--scale-rounding {text!r} is not known: choose none, up or floor")


def _parse_activations(text: str) -> str:
    if text.lower() in ("dynamic", "static", "none"):
        return text.lower()
    raise RecipeError(f"--activations {text!r} is not known: choose dynamic, static or none")


_FIELDS = {name: name for name in ("scheme", "format", "granularity", "quant_method", "scale_rounding", "activations")}
_FIELDS |= {name: name for name in ("calibration", "kv_cache", "percentile", "margin", "warmup", "tp", "gpu")}
_FIELDS |= {"ignore": "ignore", "only": "only", "pack_too": "pack", "target": "targets"}
_PARSERS: dict[str, Callable[[Any], Any]] = {
    "format": parse_format,
    "granularity": parse_granularity,
    "scale_rounding": _parse_rounding,
    "activations": _parse_activations,
    "target": parse_targets,
    "ignore": _patterns,
    "only": _patterns,
    "pack_too": _patterns,
}
