"""Everything that is decided before a byte is written: for pack, unpack and convert."""

import json
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from fp8pack.checkpoint.calibration_file import read_calibration
from fp8pack.checkpoint.config import set_dtype, set_quantization_config
from fp8pack.checkpoint.manifest_schema import check_headers
from fp8pack.checkpoint.quant_methods import find_method
from fp8pack.checkpoint.quantized import read_contents, read_low_bits
from fp8pack.checkpoint.side_files import SideFile, list_side_files
from fp8pack.checkpoint.source import Source, beside, check_floats, open_checkpoint, read_json
from fp8pack.checkpoint.staging import check_output, check_output_file
from fp8pack.errors import InputError, RecipeError
from fp8pack.inputs import parse_dtype
from fp8pack.modelfacts.contents import Contents
from fp8pack.modelfacts.experts import split_experts
from fp8pack.modelfacts.gathered import ungathered
from fp8pack.modelfacts.prefixes import strip_prefixes
from fp8pack.modelfacts.spec import TORCH_NAMES
from fp8pack.modelfacts.storage import Storage
from fp8pack.packing.options import WriteOptions
from fp8pack.planning.calibration import Calibration
from fp8pack.planning.decide import decide
from fp8pack.planning.keep import Choice
from fp8pack.planning.make_plan import choose_recipe, make_plan, make_unpack_plan
from fp8pack.planning.plan import Plan
from fp8pack.planning.recipe import WRITABLE, Recipe, Request, parse_scheme, resolve_conversion
from fp8pack.regular_files import read_regular

_MISTRAL_CONFIG = "params.json"


Verb = Literal["pack", "unpack", "convert"]


@dataclass(frozen=True, slots=True)
class _Job:
    """What is done, and what the output's name adds to that of the source.

    dtype: that of the floats, if it is another than config.json may say.
    """

    verb: Verb
    suffix: str
    dtype: str = ""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A source, the plan for it, and where the output goes.

    documents: the small files that are written anew. choice: what a budget keeps, if one was given.
    """

    verb: Verb
    source: Source
    side_files: tuple[SideFile, ...]
    plan: Plan
    documents: Mapping[str, bytes]
    output: Path
    options: WriteOptions
    choice: Choice | None = None


@dataclass(frozen=True, slots=True)
class _Announcement:
    """What config.json says of the quantization, None if nothing, and the JSON files beside it."""

    config: dict[str, Any] | None = None
    files: Mapping[str, dict[str, Any]] = field(default_factory=dict)


def prepare_pack(
    model: Path, request: Request, options: WriteOptions, calibration: Calibration | None = None
) -> Prepared:
    """Look at a checkpoint and decide how to pack it; nothing is written.

    calibration: in place of the request's file.

    Raises:
        InputError: the checkpoint is refused.
        RecipeError: the request cannot be carried out.
        OutputError, SpaceError: the output cannot stand where it is asked for.
    """
    source = _with_plain_names(open_checkpoint(model), request)
    contents = read_low_bits(source)
    if contents is None:
        source = check_floats(source)
        contents = Contents("", source.specs, source.facts)
    if part := ungathered(contents.tensors, source.facts):
        raise InputError(
            f"{source.path} is a part of a checkpoint: {part}",
            "save it with its parameters gathered (DeepSpeed: zero_to_fp32.py; FSDP: a full state dict)",
        )
    contents = split_experts(contents)
    decisions = decide(contents, request, anew=True)
    calibration = calibration or _calibration(source, request)
    _check_device(request, options)
    recipe = choose_recipe(decisions, source.facts, request, calibration)
    method, limit = find_method(recipe, request.rules), _shard_limit(source, options)
    plan = make_plan(
        decisions, contents, request, recipe=recipe, method=method, max_shard_nbytes=limit, sizes=options.sizes
    )
    announcement = _Announcement(method.config(plan), method.files(plan))
    dropped = f"{len(contents.kv_scales)} scales of K and V are dropped, which a conversion keeps"
    notes = (*source.notes, dropped) if contents.kv_scales else source.notes
    plan = replace(plan, warnings=(*plan.warnings, *notes))
    return _place(source, plan, announcement, _Job("pack", recipe.suffix, recipe.kept_dtype or ""), options)


def prepare_convert(
    checkpoint: Path, request: Request, options: WriteOptions, calibration: Calibration | None = None
) -> Prepared:
    """Look at a quantized checkpoint and decide how to turn it into an FP8 one; raises as `prepare_pack` does."""
    source, contents = _open_quantized(checkpoint, request)
    contents = split_experts(contents)
    if not contents.quantized:
        raise InputError(f"{source.path} has no FP8 weight", "`fp8pack pack` makes an FP8 checkpoint of it")
    if fused := next((s for s in contents.tensors if len(s.shape) == 3 and s.name in contents.quantized), None):
        raise InputError(
            f"{fused.file}: {fused.name!r} cannot be split into per-expert weights", "`fp8pack unpack` it, then pack"
        )
    calibration = calibration or _calibration(source, request, carries_static=contents.activations == "static")
    _check_device(request, options)
    decisions, storage = decide(contents, request), contents.storage
    if storage is None:  # FP4 and integers: nothing of the recipe is that of the source
        recipe = choose_recipe(decisions, source.facts, request, calibration)
        recipe = replace(recipe, kv_cache=recipe.kv_cache or bool(contents.kv_scales))
    else:
        recipe = _resolve(request, storage, calibration)
    method, limit = find_method(recipe, request.rules), _shard_limit(source, options)
    plan = make_plan(
        decisions, contents, request, recipe=recipe, method=method, max_shard_nbytes=limit, sizes=options.sizes
    )
    announcement = _Announcement(method.config(plan), method.files(plan))
    suffix = f"{recipe.suffix}-{recipe.quant_method}" if request.quant_method else recipe.suffix
    return _place(source, plan, announcement, _Job("convert", suffix, recipe.kept_dtype or ""), options)


def _check_device(request: Request, options: WriteOptions) -> None:
    what = "compensated rounding" if request.rounding == "compensated" else "the search for scales"
    if (request.rounding == "compensated" or request.scales == "mse") and options.device != "cpu":
        raise RecipeError(f"{what} runs on the CPU, in the order of sums that the bytes depend on", "--device cpu")


def _resolve(request: Request, storage: Storage, calibration: Calibration | None) -> Recipe:
    """The recipe of a conversion; the source's quant method stays if it can store what is asked for."""
    recipe = resolve_conversion(request, storage, calibration)
    named = request.quant_method is not None or parse_scheme(request.scheme) is not None
    if named or request.targets or storage.quant_method not in WRITABLE:
        return recipe
    same = resolve_conversion(replace(request, quant_method=storage.quant_method), storage, calibration)
    try:
        find_method(same, request.rules)
    except RecipeError:
        return recipe
    return replace(same, reason=recipe.reason)


def prepare_unpack(checkpoint: Path, dtype: str | None, options: WriteOptions) -> Prepared:
    """Look at a quantized checkpoint and decide how to turn it into floats.

    dtype: bfloat16, float16 or float32; None is that of floats that were kept in another than the source's, or else of
        most weights before they were packed.

    Raises:
        InputError: the checkpoint is refused, or holds nothing that is quantized.
        OutputError, SpaceError: the output cannot stand where it is asked for.
    """
    if dtype is not None:
        dtype = parse_dtype("dtype", dtype, tuple(TORCH_NAMES))
    source, contents = _open_quantized(checkpoint)
    if not contents.quantized:
        raise InputError(f"{source.path} has no quantized weight to unpack")
    recorded = source.manifest.recipe.get("kept_dtype") if source.manifest else None
    dtype = dtype or (recorded if recorded in TORCH_NAMES else None)
    dtype = dtype or next(name for name, stored in TORCH_NAMES.items() if stored == contents.source_dtype)
    limit = _shard_limit(source, options)
    plan = make_unpack_plan(contents, TORCH_NAMES[dtype], max_shard_nbytes=limit, sizes=options.sizes)
    job = _Job("unpack", TORCH_NAMES[dtype], dtype)
    return _place(source, plan, _Announcement(), job, options)


def _with_plain_names(source: Source, request: Request) -> Source:
    if not request.strip_prefix:
        return source
    return replace(source, specs=strip_prefixes(source.specs, request.strip_prefix))


def _open_quantized(checkpoint: Path, request: Request | None = None) -> tuple[Source, Contents]:
    source = open_checkpoint(checkpoint)
    if source.manifest is not None:
        check_headers(source.specs, source.manifest)
    source = _with_plain_names(source, request) if request else source
    contents = read_contents(source)
    if contents.unread:
        raise InputError(
            f"{source.path} has {len(contents.unread)} weights in a format that is not read, such as "
            f"{contents.unread[0]!r}",
            "use a BF16, FP16, FP32 or FP8 checkpoint of this model",
        )
    return source, contents


def _place(source: Source, plan: Plan, announcement: _Announcement, job: _Job, options: WriteOptions) -> Prepared:
    """Find where the output goes, and check that it can stand there."""
    weights = [file.name for file in source.files] + ([source.index_name] if source.index_name else [])
    side_files = () if source.is_single_file else list_side_files(source.directory, weights, options.copy)
    output = Path(os.path.abspath(options.output or _default_output(source, job)))
    if source.is_single_file and output.suffix != ".safetensors":
        raise RecipeError(
            f"{source.path.name} is a single file, and the output {output.name} is not a .safetensors file",
            f"-o {shlex.quote(output.name + '.safetensors')}",
        )
    check = check_output_file if source.is_single_file else check_output
    check(output, source.path, overwrite=options.overwrite)
    if source.is_single_file:
        plan = replace(plan, shards=(replace(plan.shards[0], file=output.name),))
    documents = _documents(source, announcement, job.dtype)
    side_files = tuple(side for side in side_files if side.name not in documents)
    return Prepared(job.verb, source, side_files, plan, documents, output, options)


def _shard_limit(source: Source, options: WriteOptions) -> int | None:
    """A single file stays one."""
    return None if source.is_single_file else options.max_shard_size


def _documents(source: Source, announcement: _Announcement, dtype: str) -> dict[str, bytes]:
    """config.json and what stands beside it, and Mistral's own configuration without what it said of the source."""
    documents: dict[str, bytes] = {}
    if source.config is not None:
        text = read_regular(source.directory / "config.json")
        text = set_quantization_config(text, announcement.config)
        documents["config.json"] = set_dtype(text, dtype) if dtype else text
        for name, document in announcement.files.items():
            documents[name] = (json.dumps(document, indent=4, ensure_ascii=False) + "\n").encode()
    if not source.is_single_file and (source.directory / _MISTRAL_CONFIG).exists():
        params = read_json(source.directory / _MISTRAL_CONFIG)
        if params.pop("quantization", None):
            if source.config is None and announcement.config is not None:
                params["quantization"] = announcement.config
            documents[_MISTRAL_CONFIG] = (json.dumps(params, indent=4, ensure_ascii=False) + "\n").encode()
    return documents


def _calibration(source: Source, request: Request, *, carries_static: bool = False) -> Calibration | None:
    scheme = parse_scheme(request.scheme)
    activations = request.activations or (scheme.activations if scheme else None)
    if request.calibration is None:
        is_compensated = request.rounding == "compensated"
        if is_compensated or request.kv_cache or (activations == "static" and not carries_static):
            file = beside(source, f"{source.name}-calibration.safetensors")
            what = "compensated rounding needs" if is_compensated else "calibrated scales need"
            moments = " --second-moments blocks" if is_compensated else ""
            raise RecipeError(
                f"{what} a calibration file",
                f"run `fp8pack calibrate {shlex.quote(str(source.path))}{moments}`, then the same command with "
                f"`--calibration {shlex.quote(str(file))}`",
            )
        return None
    calibration = read_calibration(request.calibration)
    origin = source.manifest.source.fingerprint if source.manifest else source.fingerprint
    if calibration.fingerprint not in ("", source.fingerprint, origin):
        command = f"fp8pack calibrate {shlex.quote(str(source.path))}"
        raise InputError(f"{request.calibration} is a calibration of another model", f"run `{command}`")
    return calibration


def _default_output(source: Source, job: _Job) -> Path:
    if source.is_single_file:
        return source.path.parent / f"{source.path.stem}-{job.suffix}.safetensors"
    return beside(source, f"{source.name}-{job.suffix}")
