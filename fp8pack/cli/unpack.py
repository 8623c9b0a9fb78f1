"""`fp8pack unpack`."""

from pathlib import Path
from typing import Annotated

import typer

from fp8pack.cli import options


def unpack(
    ctx: typer.Context,
    checkpoint: Annotated[
        Path, typer.Argument(help="An FP8 checkpoint of any convention, by whatever tool.", show_default=False)
    ],
    output: options.Output = None,
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16, float16 or float32; by default what the weights were before packing.")
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
    """Turn an FP8 checkpoint back into floats: value = fp8 * scale in float32, rounded once."""
    from fp8pack.cli.write import write  # these import NumPy and BLAKE3, which --help must not wait for
    from fp8pack.packing.prepare import prepare_unpack

    how = options.write_options_of(ctx.params)
    write(prepare_unpack(checkpoint, dtype, how), dry_run=dry_run, as_json=as_json, quiet=quiet, verbose=verbose)
