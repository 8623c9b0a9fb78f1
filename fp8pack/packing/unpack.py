"""`unpack`: a quantized checkpoint in, a BF16, FP16 or FP32 checkpoint out."""

from pathlib import Path

from fp8pack.inputs import Duration, Size, Texts, parse_path
from fp8pack.packing.options import WriteOptions
from fp8pack.packing.prepare import prepare_unpack
from fp8pack.packing.result import PackResult
from fp8pack.packing.write import OnProgress, run


def unpack(
    checkpoint: str | Path,
    output: str | Path | None = None,
    *,
    dtype: str | None = None,
    copy: Texts = (),
    max_shard_size: Size | None = None,
    workers: int | None = None,
    max_memory: Size | None = None,
    resume: bool = True,
    overwrite: bool = False,
    deadline: Duration | None = None,
    on_progress: OnProgress | None = None,
    dry_run: bool = False,
) -> PackResult:
    """Dequantize an FP8, FP4 or integer checkpoint into BF16, FP16 or FP32.

    checkpoint: a directory or `.safetensors` file of any convention that is read, from any tool.
    dtype: bfloat16, float16 or float32; by default the `kept_dtype` of `pack`, or else that of most weights before they
        were packed.
    Numerics: value = (element - zero point) * scale in float32, rounded once to nearest even.
    output: by default beside the source. copy: patterns of side files that are skipped by default. max_shard_size: such
        as "5GB". workers: threads. max_memory: bounds them. resume: continue unfinished work. deadline: such as "50m";
        the same call continues.
    on_progress: is told (bytes done, bytes in all). dry_run: decide and check everything, write nothing.
    Raises:
        InputError: the checkpoint is refused, or nothing in it is quantized.
        RecipeError, OutputError, SpaceError, DeadlineError: as `fp8pack.pack`.
    """
    how = WriteOptions(
        output=output,
        workers=workers,
        max_memory=max_memory,
        max_shard_size=max_shard_size,
        copy=copy,
        resume=resume,
        overwrite=overwrite,
        deadline=deadline,
    )
    return run(prepare_unpack(parse_path("checkpoint", checkpoint), dtype, how), on_progress, dry_run=dry_run)
