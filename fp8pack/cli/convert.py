"""`fp8pack convert`."""

from pathlib import Path
from typing import Annotated

import typer

from fp8pack.cli import options


def convert(
    ctx: typer.Context,
    checkpoint: Annotated[
        Path, typer.Argument(help="An FP8 checkpoint of any convention, by whatever tool.", show_default=False)
    ],
    output: options.Output = None,
    scheme: Annotated[
        str,
        typer.Option(
            help="FP8_BLOCK, FP8_DYNAMIC, FP8, MXFP8 or W8A16; auto: as the source.", rich_help_panel=options.RECIPE
        ),
    ] = "auto",
    format: options.Format = None,
    granularity: options.GranularityText = None,
    quant_method: options.QuantMethodName = None,
    scale_rounding: options.Rounding = None,
    activations: options.Activations = None,
    calibration: options.CalibrationFile = None,
    kv_cache: options.KvCache = False,
    percentile: options.Percentile = None,
    margin: options.Margin = 0,
    warmup: options.Warmup = 0,
    ignore: Annotated[
        list[str] | None,
        typer.Option("--ignore", "--exclude", metavar="PATTERN", help="Becomes BF16.", rich_help_panel=options.RECIPE),
    ] = None,
    only: options.Only = None,
    pack_too: options.PackToo = None,
    target: options.Target = None,
    tp: options.TensorParallel = None,
    gpu: options.GpuName = None,
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
    """Turn an FP8 checkpoint into one of another convention, granularity or format.

    What is not asked for stays as the source has it. FP8 bytes are carried over untouched where only the container
    differs or scales become finer; elsewhere weights are dequantized and quantized anew, and the SQNR that it costs is
    printed.

    A PATTERN is an exact tensor or module name, a glob over the whole name, or re: and a regular expression; one that
    matches nothing is an error unless ? stands before it.
    """
    from fp8pack.cli.write import write  # these import NumPy and BLAKE3, which --help must not wait for
    from fp8pack.packing.prepare import prepare_convert

    how = options.write_options_of(ctx.params)
    write(
        prepare_convert(checkpoint, options.request_of(ctx.params), how),
        dry_run=dry_run,
        as_json=as_json,
        quiet=quiet,
        verbose=verbose,
    )
