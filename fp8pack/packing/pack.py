"""`pack`: a checkpoint of floats, FP4 or integers in, an FP8 checkpoint out."""

from collections.abc import Mapping
from pathlib import Path

from fp8pack.documents import Document
from fp8pack.errors import RecipeError
from fp8pack.inputs import Duration, Size, Texts, parse_path
from fp8pack.packing.keep import prepare_keeping, read_sensitivity
from fp8pack.packing.metadata import CardSection
from fp8pack.packing.options import WriteOptions
from fp8pack.packing.prepare import prepare_pack
from fp8pack.packing.result import PackResult
from fp8pack.packing.write import OnProgress, run
from fp8pack.planning.keep import parse_budget
from fp8pack.planning.recipe_file import make_request


def pack(
    model: str | Path,
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
    recipe: str | Path | Mapping[str, object] | None = None,
    ignore: Texts = (),
    only: Texts = (),
    pack: Texts = (),
    keep_first_layers: int = 0,
    keep_last_layers: int = 0,
    kept_dtype: str | None = None,
    targets: Texts = (),
    tp: int | None = None,
    ep: int | None = None,
    gpu: str | None = None,
    strict_target: bool = False,
    strip_prefix: Texts = (),
    keep: str | None = None,
    sensitivity: str | Path | Document | None = None,
    copy: Texts = (),
    max_shard_size: Size | None = None,
    workers: int | None = None,
    max_memory: Size | None = None,
    device: str = "cpu",
    resume: bool = True,
    overwrite: bool = False,
    deadline: Duration | None = None,
    on_progress: OnProgress | None = None,
    card_section: CardSection | None = None,
    dry_run: bool = False,
) -> PackResult:
    """Pack a checkpoint into FP8.

    model: a directory, a `.safetensors` file, or the id of a repository in the hub cache, of floats, FP4 or integers.
    scheme: FP8_BLOCK, FP8_DYNAMIC, FP8, MXFP8, W8A16, FP8_SCALED or auto, which chooses by shapes and targets.
    format: e4m3 or e5m2.
    granularity: tensor, channel, group:G, block:RxC or mx: the region of a weight [N, K] that shares a scale.
    quant_method: the on-disk convention: fp8, compressed-tensors, modelopt, mxfp8, quark, torchao, comfyui,
        comfyui-scaled or fp8pack. scale_rounding: none, up or floor, the last two to powers of two.
    scales: amax, or mse, which takes of 16 candidates in the octave above the one with the least error.
    rounding: of weights: nearest, or compensated (gptq), so that outputs are close on the inputs of the calibration.
    activations: dynamic, static or none. calibration: the file of `fp8pack.calibrate`, for static activations,
        `kv_cache` and compensated rounding. percentile: clip activations there instead of at amax. margin: activation
        scales times 2^margin. warmup: skip the first prompts.
    recipe: a YAML file or a mapping with these keywords, or the fp8pack.json of an earlier output; keywords overrule
        it.
    ignore, only, pack: patterns of tensors to keep in BF16, to quantize alone, to quantize whatever the policy says. A
        pattern is a name, a glob over the whole name, or `re:` and an expression; `?` before it lets it match nothing.
    keep_first_layers, keep_last_layers: so many decoder layers stay in BF16.
    keep: a budget: `kl<=0.001`, `bytes<=8.5GB`, `worst:8` or `sqnr_output>=30`: weights that cost most stay.
    sensitivity: what each costs: the result of `evaluate_layers`, or the file of `fp8pack eval --per-linear -o`.
    kept_dtype: bfloat16 or float16: the dtype of floats that are not quantized, rounded once to nearest even; what
        engines keep in float32 stays. By default that of the source.
    targets, tp, ep, gpu: the engines that must load the output, at which tensor-parallel size, with experts divided
        among how many groups of GPUs, on which GPU. strict_target:
        raise if it is not known whether one does. strip_prefix: prefixes to remove from tensor names: `_orig_mod.`.
    output: by default beside the source, named after the scheme. copy: patterns of side files that are skipped by
        default. max_shard_size: such as "5GB". workers: threads. max_memory: bounds them. device: cpu or cuda; the
        bytes are the same. resume: continue unfinished work. deadline: such as "50m"; the same call continues.
    on_progress: is told (bytes done, bytes in all). dry_run: decide and check everything, write nothing.
    card_section: called with the packed directory before it gets its name; the Markdown that it returns goes into the
        model card. `pack --eval` puts the result of `evaluate` there.
    Raises:
        RecipeError: the options cannot be carried out, or a target cannot load the result.
        InputError: the checkpoint is refused. OutputError, SpaceError: the output cannot be written.
        DeviceError: torch sees no such device. DeadlineError: finished work is kept, and the same call continues.
    """
    request = make_request(
        recipe,
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
        keep_first_layers=keep_first_layers,
        keep_last_layers=keep_last_layers,
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
    if keep is None and sensitivity is None:
        prepared = prepare_pack(parse_path("model", model), request, how)
    elif keep is None or sensitivity is None:
        raise RecipeError("a budget and what the weights cost belong together", "give both keep and sensitivity")
    else:
        budget, found = parse_budget(keep), read_sensitivity(sensitivity)
        prepared = prepare_keeping(parse_path("model", model), request, how, budget, found)
    return run(prepared, on_progress, dry_run=dry_run, card_section=card_section)
