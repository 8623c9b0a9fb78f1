"""`fp8pack convert`."""

from typing import Annotated

import typer

from fp8pack.cli import options


def convert(
    ctx: typer.Context,
    checkpoint: options.Checkpoint,
    output: options.Output = None,
    scheme: Annotated[
        str,
        options.recipe_option(
            "--scheme",
            help=f"{', '.join(options.SCHEME_NAMES)}, or auto: as the source",
            values=("auto", *options.SCHEME_NAMES),
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
    ignore: Annotated[
        list[str] | None,
        options.recipe_option("--ignore", "--exclude", metavar="PATTERN", help="Dequantize matching tensors to BF16"),
    ] = None,
    only: options.Only = None,
    pack: options.PackToo = None,
    kept_dtype: options.KeptDtype = None,
    targets: options.Targets = None,
    tp: options.TensorParallel = None,
    ep: options.ExpertParallel = None,
    gpu: options.GpuName = None,
    strict_target: options.StrictTarget = False,
    strip_prefix: options.StripPrefix = None,
    copy: options.Copy = None,
    max_shard_size: options.MaxShardSize = None,
    workers: options.Workers = None,
    max_memory: options.MaxMemory = "256MiB",
    device: options.Device = "cpu",
    resume: options.Resume = True,
    deadline: options.Deadline = None,
    overwrite: options.Overwrite = False,
    dry_run: options.DryRun = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Convert an FP8, FP4 or integer checkpoint to another FP8 one.

    Options that are not given follow an FP8 source. FP8 bytes are passed through unchanged if only the convention
    changes or scales become finer. Other weights are dequantized and requantized, and their SQNR against the source is
    printed.

    A PATTERN is a tensor or module name, a glob over the whole name, or re: and a regular expression. A pattern that
    matches nothing is an error, unless it begins with ?.
    """
    from fp8pack.cli.write import write  # imports NumPy and BLAKE3, not needed for --help
    from fp8pack.packing.options import WriteOptions
    from fp8pack.packing.prepare import prepare_convert
    from fp8pack.planning.recipe_file import make_request

    request = make_request(None, **options.request_params(ctx))
    prepared = prepare_convert(checkpoint, request, WriteOptions(**options.write_params(ctx)))
    write(prepared, dry_run=dry_run, as_json=as_json, quiet=quiet, verbose=verbose)
