"""`fp8pack pack`."""

from pathlib import Path
from typing import Annotated

import typer

from fp8pack.cli import options
from fp8pack.units import parse_duration, parse_size


def pack(
    model: Annotated[
        Path,
        typer.Argument(
            help="A directory, a .safetensors file, or the id of a repository in the hub cache.", show_default=False
        ),
    ],
    output: options.Output = None,
    scheme: Annotated[
        str, typer.Option(help="auto, FP8_BLOCK, FP8_DYNAMIC, FP8, MXFP8 or W8A16.", rich_help_panel=options.RECIPE)
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
    recipe: Annotated[
        Path | None, typer.Option(help="A recipe in YAML; flags overrule it.", rich_help_panel=options.RECIPE)
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(
            "--ignore", "--exclude", metavar="PATTERN", help="Stays as it is.", rich_help_panel=options.RECIPE
        ),
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
    """Write an FP8 checkpoint from a BF16, FP16 or FP32 one.

    A PATTERN is an exact tensor or module name, a glob over the whole name, or re: and a regular expression; one that
    matches nothing is an error unless ? stands before it.
    """
    from fp8pack.cli.write import write  # these import NumPy and BLAKE3, which --help must not wait for
    from fp8pack.packing.prepare import WriteOptions, prepare_pack

    request = options.make_request(
        recipe,
        scheme=scheme,
        format=format,
        granularity=granularity,
        quant_method=quant_method,
        scale_rounding=scale_rounding,
        activations=activations,
        calibration=calibration,
        kv_cache=kv_cache,
        percentile=percentile,
        margin=margin,
        warmup=warmup,
        ignore=ignore,
        only=only,
        pack=pack_too,
        targets=target,
        tp=tp,
        gpu=gpu,
    )
    how = WriteOptions(
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
    write(prepare_pack(model, request, how), dry_run=dry_run, as_json=as_json, quiet=quiet, verbose=verbose)
