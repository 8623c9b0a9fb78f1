"""`fp8pack unpack`."""

from typing import Annotated

import typer

from fp8pack.cli import options


def unpack(
    ctx: typer.Context,
    checkpoint: options.Checkpoint,
    output: options.Output = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="bfloat16, float16 or float32 [default: as before packing]",
            autocompletion=options.completing(("bfloat16", "float16", "float32")),
        ),
    ] = None,
    copy: options.Copy = None,
    max_shard_size: options.MaxShardSize = None,
    workers: options.Workers = None,
    max_memory: options.MaxMemory = "256MiB",
    resume: options.Resume = True,
    deadline: options.Deadline = None,
    overwrite: options.Overwrite = False,
    dry_run: options.DryRun = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Dequantize an FP8, FP4 or integer checkpoint to BF16, FP16 or FP32.

    value = (element - zero point) * scale in float32, rounded once to nearest even.
    """
    from fp8pack.cli.write import write  # imports NumPy and BLAKE3, not needed for --help
    from fp8pack.packing.options import WriteOptions
    from fp8pack.packing.prepare import prepare_unpack

    prepared = prepare_unpack(checkpoint, dtype, WriteOptions(**options.write_params(ctx)))
    write(prepared, dry_run=dry_run, as_json=as_json, quiet=quiet, verbose=verbose)
