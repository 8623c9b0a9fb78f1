"""Everything that is decided before a byte is written."""

import os
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

from fp8pack.checkpoint.calibration_file import read_calibration
from fp8pack.checkpoint.quant_methods import WrittenMethod, find_method
from fp8pack.checkpoint.side_files import SideFile, list_side_files
from fp8pack.checkpoint.source import Source, beside, open_source
from fp8pack.checkpoint.staging import check_output, check_output_file
from fp8pack.errors import InputError, RecipeError
from fp8pack.planning.calibration import Calibration
from fp8pack.planning.plan import PackPlan, choose_recipe, decide, make_plan
from fp8pack.planning.recipe import Request, parse_scheme

DEFAULT_MEMORY = 256 << 20


@dataclass(frozen=True, slots=True)
class WriteOptions:
    """How to write; only `max_shard_nbytes` and `copy` change what the output holds. None stands for the default."""

    output: Path | None = None
    workers: int | None = None
    max_memory: int = DEFAULT_MEMORY
    max_shard_nbytes: int | None = None
    device: str = "cpu"
    copy: tuple[str, ...] = ()
    resume: bool = True
    overwrite: bool = False
    deadline_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Prepared:
    """A source, the plan for it, and where the output goes."""

    source: Source
    side_files: tuple[SideFile, ...]
    request: Request
    plan: PackPlan
    method: WrittenMethod
    output: Path
    options: WriteOptions


def prepare(model: Path, request: Request, options: WriteOptions) -> Prepared:
    """Look at a checkpoint and decide everything; nothing is written.

    Raises:
        InputError: the checkpoint is refused.
        RecipeError: the request cannot be carried out.
        OutputError, SpaceError: the output cannot stand where it is asked for.
    """
    source = open_source(model)
    weights = [file.name for file in source.files] + ([source.index_name] if source.index_name else [])
    side_files = () if source.is_single_file else list_side_files(source.directory, weights, options.copy)
    decisions = decide(source.specs, source.facts, request)
    recipe = choose_recipe(decisions, source.facts, request, _calibration(source, request))
    method = find_method(recipe.quant_method)
    plan = make_plan(
        decisions, source.facts, request, recipe=recipe, method=method, max_shard_nbytes=options.max_shard_nbytes
    )
    output = Path(os.path.abspath(options.output or _default_output(source, plan)))
    if source.is_single_file and output.suffix != ".safetensors":
        raise RecipeError(
            f"{source.path.name} is a single file, so -o must name a .safetensors file, not {output.name}"
        )
    check = check_output_file if source.is_single_file else check_output
    check(output, source.path, overwrite=options.overwrite)
    if source.is_single_file:
        plan = replace(plan, shards=(replace(plan.shards[0], file=output.name),))
    return Prepared(source, side_files, request, plan, method, output, options)


def _calibration(source: Source, request: Request) -> Calibration | None:
    scheme = parse_scheme(request.scheme)
    activations = request.activations or (scheme.activations if scheme else None)
    if request.calibration is None:
        if request.kv_cache or activations == "static":
            file = beside(source, f"{source.name}-calibration.safetensors")
            raise RecipeError(
                f"scales of activations need a calibration: run `fp8pack calibrate {shlex.quote(str(source.path))}`, "
                f"then the same command with `--calibration {shlex.quote(str(file))}`"
            )
        return None
    calibration = read_calibration(request.calibration)
    if calibration.fingerprint and calibration.fingerprint != source.fingerprint:
        raise InputError(
            f"{request.calibration} is a calibration of another model: run fp8pack calibrate {source.path}"
        )
    return calibration


def _default_output(source: Source, plan: PackPlan) -> Path:
    if source.is_single_file:
        return source.path.parent / f"{source.path.stem}-fp8.safetensors"
    return beside(source, f"{source.name}-{plan.recipe.suffix}")
