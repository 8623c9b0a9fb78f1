"""`fp8pack pack`."""

from pathlib import Path
from typing import Annotated

import typer

from fp8pack.cli import options
from fp8pack.errors import RecipeError


def pack(
    ctx: typer.Context,
    model: Annotated[
        Path, typer.Argument(help="Directory, .safetensors file, or repository in the hub cache.", show_default=False)
    ],
    output: options.Output = None,
    scheme: Annotated[
        str,
        options.recipe_option(
            "--scheme", help=f"auto, {', '.join(options.SCHEME_NAMES)}", values=("auto", *options.SCHEME_NAMES)
        ),
    ] = "auto",
    format: options.Format = None,
    granularity: options.GranularityText = None,
    quant_method: options.QuantMethodName = None,
    scale_rounding: options.Rounding = None,
    scales: options.ScaleChoice = "amax",
    rounding: options.WeightRounding = "nearest",
    activations: options.Activations = None,
    calibration: options.CalibrationFile = None,
    kv_cache: options.KvCache = False,
    percentile: options.Percentile = None,
    margin: options.Margin = None,
    warmup: options.Warmup = None,
    recipe: options.RecipeFile = None,
    ignore: options.Ignore = None,
    only: options.Only = None,
    pack: options.PackToo = None,
    keep_first_layers: options.KeepFirst = None,
    keep_last_layers: options.KeepLast = None,
    kept_dtype: options.KeptDtype = None,
    targets: options.Targets = None,
    tp: options.TensorParallel = None,
    ep: options.ExpertParallel = None,
    gpu: options.GpuName = None,
    strict_target: options.StrictTarget = False,
    strip_prefix: options.StripPrefix = None,
    keep: options.Keep = None,
    sensitivity: options.Sensitivity = None,
    copy: options.Copy = None,
    max_shard_size: options.MaxShardSize = None,
    workers: options.Workers = None,
    max_memory: options.MaxMemory = "256MiB",
    device: options.Device = "cpu",
    resume: options.Resume = True,
    deadline: options.Deadline = None,
    overwrite: options.Overwrite = False,
    evaluate: Annotated[
        bool,
        typer.Option(
            "--eval", help="Measure what it cost the model, as `fp8pack eval` does, and put that into the model card"
        ),
    ] = False,
    dry_run: options.DryRun = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Quantize a checkpoint of BF16, FP16, FP32, FP4 or integers to FP8.

    A PATTERN is a tensor or module name, a glob over the whole name, or re: and a regular expression. A pattern that
    matches nothing is an error, unless it begins with ?.
    """
    from fp8pack.cli.write import write  # imports NumPy and BLAKE3, not needed for --help
    from fp8pack.packing.options import WriteOptions
    from fp8pack.packing.prepare import prepare_pack
    from fp8pack.planning.recipe_file import make_request

    request = make_request(recipe, **options.request_params(ctx))
    how = WriteOptions(**options.write_params(ctx))
    if keep is None and sensitivity is not None:
        raise RecipeError("a sensitivity is for a budget", "add --keep BUDGET")
    if keep is None:
        prepared = prepare_pack(model, request, how)
    else:
        from fp8pack.cli.keep import keep_within

        prepared = keep_within(model, request, how, keep, sensitivity, quiet=quiet)
    section = None
    if evaluate:
        from fp8pack.cli.card_section import measured_section

        section = measured_section(prepared.source, quiet=quiet)
    write(prepared, dry_run=dry_run, as_json=as_json, quiet=quiet, verbose=verbose, card_section=section)
