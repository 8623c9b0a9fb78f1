"""`convert`: a quantized checkpoint in, an FP8 checkpoint of another convention, granularity or format out."""

from pathlib import Path

from fp8pack.inputs import Duration, Size, Texts, parse_path
from fp8pack.packing.options import WriteOptions
from fp8pack.packing.prepare import prepare_convert
from fp8pack.packing.result import PackResult
from fp8pack.packing.write import OnProgress, run
from fp8pack.planning.recipe_file import make_request


def convert(
    checkpoint: str | Path,
    output: str | Path | None = None,
    *,
    scheme: str = "auto",
    format: str | None = None,
    granularity: str | None = None,
    quant_method: str | None = None,
    scale_rounding: str | None = None,
    scales: str = "amax",
    rounding: str = "nearest",
    activations: str | None = None,
    calibration: str | Path | None = None,
    kv_cache: bool = False,
    percentile: float | None = None,
    margin: int = 0,
    warmup: int = 0,
    ignore: Texts = (),
    only: Texts = (),
    pack: Texts = (),
    kept_dtype: str | None = None,
    targets: Texts = (),
    tp: int | None = None,
    ep: int | None = None,
    gpu: str | None = None,
    strict_target: bool = False,
    strip_prefix: Texts = (),
    copy: Texts = (),
    max_shard_size: Size | None = None,
    workers: int | None = None,
    max_memory: Size | None = None,
    device: str = "cpu",
    resume: bool = True,
    overwrite: bool = False,
    deadline: Duration | None = None,
    on_progress: OnProgress | None = None,
    dry_run: bool = False,
) -> PackResult:
    """Convert an FP8, FP4 or integer checkpoint into FP8 of another convention, granularity or format.

    checkpoint: a directory or `.safetensors` file of any convention that is read, from any tool. What is not asked for
        stays as the source has it. The FP8 bytes pass through unchanged where every region of the output lies within
        one of the source; elsewhere, and from FP4 and integers, they are dequantized to float32 and requantized.
    scheme: FP8_BLOCK, FP8_DYNAMIC, FP8, MXFP8, W8A16, FP8_SCALED or auto, as the source; of FP4 and integers as in
        `pack`. format: e4m3 or e5m2.
    granularity: tensor, channel, group:G, block:RxC or mx: the region of a weight [N, K] that shares a scale.
    quant_method: the on-disk convention: fp8, compressed-tensors, modelopt, mxfp8, quark, torchao, comfyui,
        comfyui-scaled or fp8pack. scale_rounding: none, up or floor, the last two to powers of two.
    scales: amax, or mse, which takes of 16 candidates in the octave above the one with the least error.
    rounding: of weights that are requantized: nearest, or compensated (gptq), so that outputs are close on the inputs
        of the calibration.
    activations: dynamic, static or none. calibration: the file of `fp8pack.calibrate`, for static activations,
        `kv_cache` and compensated rounding. percentile: clip activations there instead of at amax. margin: activation
        scales times 2^margin. warmup: skip the first prompts.
    ignore: patterns of tensors to dequantize to BF16, or to `kept_dtype`. only, pack, kept_dtype, targets, tp, ep, gpu,
        strict_target, strip_prefix: as in `pack`.
    output: by default beside the source, named after the scheme. copy: patterns of side files that are skipped by
        default. max_shard_size: such as "5GB". workers: threads. max_memory: bounds them. device: cpu or cuda; the
        bytes are the same. resume: continue unfinished work. deadline: such as "50m"; the same call continues.
    on_progress: is told (bytes done, bytes in all). dry_run: decide and check everything, write nothing.
    Raises:
        Fp8PackError: of the kinds that `fp8pack.pack` raises.
    """
    request = make_request(
        None,
        scheme=scheme,
        format=format,
        granularity=granularity,
        quant_method=quant_method,
        scale_rounding=scale_rounding,
        scales=scales,
        rounding=rounding,
        activations=activations,
        calibration=calibration,
        kv_cache=kv_cache,
        percentile=percentile,
        margin=margin,
        warmup=warmup,
        ignore=ignore,
        only=only,
        pack=pack,
        kept_dtype=kept_dtype,
        targets=targets,
        tp=tp,
        ep=ep,
        gpu=gpu,
        strict_target=strict_target,
        strip_prefix=strip_prefix,
    )
    how = WriteOptions(
        output=output,
        workers=workers,
        max_memory=max_memory,
        max_shard_size=max_shard_size,
        device=device,
        copy=copy,
        resume=resume,
        overwrite=overwrite,
        deadline=deadline,
    )
    return run(prepare_convert(parse_path("checkpoint", checkpoint), request, how), on_progress, dry_run=dry_run)
