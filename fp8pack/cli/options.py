"""Options that several commands share, each declared once. Commands forward values unchecked; requests check them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from fp8pack.engines.gpus import GPUS
from fp8pack.engines.known import NAMES
from fp8pack.numerics.formats import FORMATS
from fp8pack.numerics.rounding import SCALE_CHOICES, WEIGHT_ROUNDINGS
from fp8pack.planning.recipe import ACTIVATIONS, KEPT_DTYPES, ROUNDINGS, SCHEMES, WRITABLE

RECIPE, WRITING, OUTPUT = "Recipe", "Writing", "Output"
SCHEME_NAMES = tuple(scheme.name for scheme in SCHEMES)
GRANULARITIES = ("tensor", "channel", "group:128", "block:128x128", "mx")


def completing(values: Sequence[str]) -> Callable[[str], list[str]]:
    """Return a completion of these values, for shells."""
    return lambda incomplete: [value for value in values if value.lower().startswith(incomplete.lower())]


def recipe_option(*flags: str, help: str, values: Sequence[str] = (), metavar: str = "NAME") -> Any:
    """Return an option that changes the bytes of the output."""
    complete = completing(values) if values else None
    return typer.Option(*flags, help=help, metavar=metavar, autocompletion=complete, rich_help_panel=RECIPE)


def _writing(*flags: str, help: str, metavar: str | None = None) -> Any:
    return typer.Option(*flags, help=help, metavar=metavar, rich_help_panel=WRITING)


def _output(*flags: str, help: str) -> Any:
    return typer.Option(*flags, help=help, rich_help_panel=OUTPUT)


Checkpoint = Annotated[
    Path,
    typer.Argument(help="Quantized checkpoint: directory or .safetensors file, from any tool.", show_default=False),
]
Output = Annotated[
    Path | None, typer.Option("-o", "--output", metavar="PATH", help="Output path [default: beside the source]")
]
Format = Annotated[
    str | None, recipe_option("--format", help="e4m3 or e5m2", values=[format.name for format in FORMATS])
]
GranularityText = Annotated[
    str | None,
    recipe_option(
        "--granularity", help="Region per scale: tensor, channel, group:G, block:RxC or mx", values=GRANULARITIES
    ),
]
QuantMethodName = Annotated[
    str | None,
    recipe_option("--quant-method", help=f"On-disk convention: {', '.join(WRITABLE)}", values=WRITABLE),
]
Rounding = Annotated[
    str | None,
    recipe_option("--scale-rounding", help="Round scales to powers of two: none, up or floor", values=ROUNDINGS),
]
ScaleChoice = Annotated[
    str,
    recipe_option("--scales", help="amax, or mse: of 16 candidates the one with the least error", values=SCALE_CHOICES),
]
WeightRounding = Annotated[
    str,
    recipe_option(
        "--rounding",
        help="Round weights to nearest, or compensated (GPTQ) with a calibration's second moments",
        values=WEIGHT_ROUNDINGS,
    ),
]
Activations = Annotated[
    str | None,
    recipe_option("--activations", help="How activations are scaled: dynamic, static or none", values=ACTIVATIONS),
]
CalibrationFile = Annotated[
    Path | None,
    recipe_option(
        "--calibration",
        metavar="FILE",
        help="Calibration file from `fp8pack calibrate`, for static scales, K/V scales and compensated rounding",
    ),
]
KvCache = Annotated[
    bool, typer.Option("--kv-cache", help="Add calibrated scales for an FP8 KV cache", rich_help_panel=RECIPE)
]
Percentile = Annotated[
    str | None,
    recipe_option(
        "--percentile",
        metavar="P",
        help="Clip activations at this percentile instead of amax (usually lowers accuracy)",
    ),
]
Margin = Annotated[str | None, recipe_option("--margin", metavar="N", help="Multiply activation scales by 2^N")]
Warmup = Annotated[
    str | None, recipe_option("--warmup", metavar="N", help="Skip the first N prompts when static scales are computed")
]
RecipeFile = Annotated[
    Path | None,
    recipe_option(
        "--recipe",
        metavar="FILE",
        help="Recipe in YAML, or fp8pack.json of an earlier output; other options override it",
    ),
]
Ignore = Annotated[
    list[str] | None,
    recipe_option("--ignore", "--exclude", metavar="PATTERN", help="Keep matching tensors unquantized"),
]
Only = Annotated[
    list[str] | None, recipe_option("--only", metavar="PATTERN", help="Quantize only tensors matching PATTERN")
]
PackToo = Annotated[
    list[str] | None, recipe_option("--pack", metavar="PATTERN", help="Also quantize tensors matching PATTERN")
]
KeepFirst = Annotated[
    str | None, recipe_option("--keep-first-layers", metavar="N", help="Keep the first N decoder layers unquantized")
]
KeepLast = Annotated[
    str | None, recipe_option("--keep-last-layers", metavar="N", help="Keep the last N decoder layers unquantized")
]
KeptDtype = Annotated[
    str | None,
    recipe_option(
        "--kept-dtype",
        help="Store floats that are not quantized in bfloat16 or float16 [default: as the source]",
        values=KEPT_DTYPES,
    ),
]
Targets = Annotated[
    list[str] | None,
    recipe_option(
        "--target",
        "--targets",
        metavar="ENGINE,...",
        help=f"Engines that must load the output: {', '.join(NAMES)}",
        values=tuple(NAMES),
    ),
]
ExpertParallel = Annotated[
    str | None, recipe_option("--ep", metavar="N", help="Groups of GPUs among which the targets divide experts")
]
TensorParallel = Annotated[str | None, recipe_option("--tp", metavar="N", help="Tensor-parallel size of the targets")]
GpuName = Annotated[
    str | None, recipe_option("--gpu", help="Target GPU, e.g. h100, b200 or mi300x", values=tuple(GPUS))
]
StrictTarget = Annotated[
    bool, recipe_option("--strict-target", help="Refuse the output if it is not known whether a target loads it")
]
StripPrefix = Annotated[
    list[str] | None,
    recipe_option("--strip-prefix", metavar="PREFIX", help="Remove PREFIX from tensor names, e.g. _orig_mod."),
]
Keep = Annotated[
    str | None,
    recipe_option(
        "--keep",
        metavar="BUDGET",
        help="Weights that cost most stay unquantized: kl<=0.001, bytes<=8.5GB, worst:8 or sqnr_output>=30",
    ),
]
Sensitivity = Annotated[
    Path | None,
    recipe_option(
        "--sensitivity",
        metavar="FILE",
        help="What weights cost, by `fp8pack eval`: no model is run for the budget",
    ),
]
Copy = Annotated[
    list[str] | None,
    _writing("--copy", metavar="PATTERN", help="Also copy side files that are excluded by default"),
]
MaxShardSize = Annotated[
    str | None, _writing("--max-shard-size", metavar="SIZE", help="e.g. 5GB [default: the source's shards]")
]
Workers = Annotated[str | None, _writing("--workers", metavar="N", help="Threads [default: one per core]")]
MaxMemory = Annotated[str, _writing("--max-memory", metavar="SIZE", help="Memory budget; limits the threads")]
Device = Annotated[str, _writing("--device", metavar="NAME", help="cpu or cuda; the output is byte-identical")]
Resume = Annotated[bool, _writing("--resume/--no-resume", help="Continue unfinished work, or discard it")]
Deadline = Annotated[
    str | None,
    _writing("--deadline", metavar="TIME", help="Stop after e.g. 50m or 2h; the same command continues"),
]
Overwrite = Annotated[bool, _writing("--overwrite", help="Replace an existing output")]
DryRun = Annotated[bool, _output("--dry-run", help="Print what would be done; write nothing")]
AsJson = Annotated[bool, _output("--json", help="Print one JSON document on stdout")]
Quiet = Annotated[bool, _output("-q", "--quiet", help="Print only errors on stderr")]
Verbose = Annotated[bool, _output("-v", "--verbose", help="Print one line per tensor")]
FailIf = Annotated[
    list[str] | None,
    typer.Option(
        "--fail-if", metavar="CONDITION", help="Exit with code 8 when the condition is true, e.g. 'sqnr_min<28'"
    ),
]

_WRITE = ("output", "workers", "max_memory", "max_shard_size", "device", "copy", "resume", "overwrite", "deadline")


def request_params(ctx: typer.Context) -> dict[str, Any]:
    """Return the parameters of a command for its request, as they were typed."""
    from fp8pack.planning.recipe_file import DEFAULTS

    return {name: value for name, value in ctx.params.items() if name in DEFAULTS and value is not None}


def write_params(ctx: typer.Context) -> dict[str, Any]:
    """Return the parameters of a command for writing, as they were typed."""
    return {name: value for name, value in ctx.params.items() if name in _WRITE and value is not None}


Html = Annotated[
    Path | None,
    typer.Option("--html", metavar="FILE", help="Write a page with all of it: one file, which loads nothing"),
]
AsMarkdown = Annotated[bool, typer.Option("--markdown", help="Print Markdown on stdout, for a pull request")]
