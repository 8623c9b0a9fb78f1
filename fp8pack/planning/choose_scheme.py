"""How `auto` chooses a scheme: by the shapes, the model, and the targets."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from fp8pack.engines.case import TP_SIZES, Case, Weights
from fp8pack.engines.gpus import parse_gpu
from fp8pack.engines.judge import judge_engine
from fp8pack.engines.known import ENGINES, NAMES, find_engine, id_of
from fp8pack.errors import RecipeError
from fp8pack.modelfacts.fused import together
from fp8pack.modelfacts.model import ModelFacts
from fp8pack.modelfacts.storage import Storage
from fp8pack.modelfacts.tensor_parallel import Packed, tp_problem
from fp8pack.numerics.formats import E4M3, E5M2
from fp8pack.numerics.granularity import BLOCK_128, MX, TENSOR, Granularity
from fp8pack.numerics.rounding import ScaleRounding
from fp8pack.planning.recipe import (
    FP8,
    FP8_BLOCK,
    FP8_DYNAMIC,
    FP8_SCALED,
    MXFP8,
    W8A16,
    Request,
    Scheme,
    parse_scheme,
    spelling_of,
)
from fp8pack.planning.shapes import shape_problem

_PACK_TWICE = "pack once for each target"
_LARGE_NBYTES = 16 * 10**9  # a model above this is served on several GPUs


def _scheme(method: str, granularity: Granularity, activations: str = "dynamic") -> Scheme:
    rounding = ScaleRounding.UP if granularity == MX else ScaleRounding.NONE
    detail = granularity.name.replace(":", "-") + ("" if activations == "dynamic" else f"-{activations}")
    return Scheme("custom", E4M3, granularity, rounding, activations, method, f"FP8-{detail}")


# What `auto` tries for named targets, the best first.
_CHOICES = (
    FP8_BLOCK,
    FP8_DYNAMIC,
    _scheme("fp8", TENSOR),
    _scheme("compressed-tensors", TENSOR),
    _scheme("compressed-tensors", BLOCK_128),
    FP8_SCALED,
    MXFP8,
    _scheme("modelopt", MX),
    _scheme("mxfp8", MX),
    FP8,
    _scheme("compressed-tensors", TENSOR, "static"),
    _scheme("fp8", TENSOR, "static"),
    W8A16,
)


@dataclass(frozen=True, slots=True)
class _Trial:
    """A scheme judged for the targets: how many weights remain in BF16, why a target cannot load it, and what helps."""

    scheme: Scheme
    num_ignored: int
    refusals: dict[str, str]
    remedies: dict[str, str]


def choose_scheme(
    request: Request, packed: Packed, facts: ModelFacts, *, is_diffusion: bool = False
) -> tuple[Scheme, str]:
    """Return the scheme and the reason for it; block scales unless a shape, an engine or a target excludes them.

    Raises:
        RecipeError: no scheme works for all targets, or the GPU is not known.
    """
    named = parse_scheme(request.scheme)
    if named is not None:
        return named, "asked for"
    scheme, reason = _choose(request, packed, facts, is_diffusion)
    gpu, granularity = parse_gpu(request.gpu), request.granularity or scheme.granularity
    if gpu and gpu.wants_powers_of_two and granularity == BLOCK_128 and request.scale_rounding is None:
        return replace(scheme, scale_rounding=ScaleRounding.UP), f"{reason}, in powers of two for {gpu.name}"
    return scheme, reason


def _choose(request: Request, packed: Packed, facts: ModelFacts, is_diffusion: bool) -> tuple[Scheme, str]:
    static = request.activations == "static" or (
        request.calibration is not None and not request.kv_cache and request.rounding == "nearest"
    )
    activations = request.activations or ("static" if static else "dynamic")
    overridden = [_overridden(choice, request) for choice in _CHOICES if choice.activations == activations]
    choices = [choice for choice in overridden if choice is not None]
    if request.targets and choices:
        return _choose_for_targets(choices, request, packed, facts)
    scaled = next((choice for choice in choices if choice.quant_method == FP8_SCALED.quant_method), None)
    if is_diffusion and scaled:
        return scaled, "auto: a diffusion model, as ComfyUI loads it"
    if static:
        return FP8, "auto: the calibration gives static activation scales"
    problems = (tp_problem(packed, BLOCK_128, tp, facts, request.ep or 1) for tp in _sizes(request, packed))
    if problem := _ragged(packed) or next(filter(None, problems), None):
        return FP8_DYNAMIC, f"auto: {problem}"
    for engine in ENGINES:
        loader = engine.renaming.get(facts.architecture)
        if loader and (not request.targets or engine.id in map(id_of, request.targets)):
            return FP8_DYNAMIC, f"auto: {engine.name}'s {loader} loader loses block scales"
    return FP8_BLOCK, "auto: every packed dimension is a multiple of 128"


def _overridden(choice: Scheme, request: Request) -> Scheme | None:
    """Return a choice with the format and rounding that are asked for; None if the request excludes it."""
    method = request.quant_method or choice.quant_method
    if method != choice.quant_method or request.granularity not in (None, choice.granularity):
        return None
    if request.format == E5M2 and choice.quant_method != "comfyui":
        return None
    rounding = request.scale_rounding or choice.scale_rounding
    return replace(choice, format=request.format or choice.format, scale_rounding=rounding)


def _ragged(packed: Packed) -> str | None:
    spec = next((spec for spec, _ in packed if not BLOCK_128.fits(spec.shape)), None)
    return f"{spec.name} is {spec.shape[0]} x {spec.shape[1]}, not a multiple of 128" if spec else None


def _sizes(request: Request, packed: Packed) -> tuple[int, ...]:
    if request.tp:
        return (request.tp,)
    return TP_SIZES[1:] if sum(spec.nbytes for spec, _ in packed) > _LARGE_NBYTES else ()


def _choose_for_targets(
    choices: Sequence[Scheme], request: Request, packed: Packed, facts: ModelFacts
) -> tuple[Scheme, str]:
    """Return the first choice that every target loads, and that leaves the fewest weights in BF16."""
    sizes = _sizes(request, packed)
    if not request.tp:  # where heads cannot be sharded, no scheme helps
        sizes = tuple(tp for tp in sizes if tp_problem((), TENSOR, tp, facts) is None)
    trials: list[_Trial] = []
    for choice in choices:
        trials.append(_try(choice, request, packed, facts, sizes or (1,)))
        if not trials[-1].refusals and not trials[-1].num_ignored:
            break  # none can be better
    serving = [trial for trial in trials if not trial.refusals]
    if not serving:
        raise _conflict(trials, request.targets)
    best = min(serving, key=lambda trial: trial.num_ignored)
    return best.scheme, f"auto: {_reason(best, trials[0], packed, request.targets)}"


def _reason(best: _Trial, first: _Trial, packed: Packed, targets: Sequence[str]) -> str:
    names = ", ".join(NAMES[id_of(target)] for target in targets)
    if best is not first:
        refused = next((f"{NAMES[target]}: {reason}" for target, reason in first.refusals.items()), None)
        return refused or _ragged(packed) or f"what {names} can load"
    if best.num_ignored:
        return f"{best.num_ignored} weights are ignored: they do not fit the {best.scheme.granularity} of {names}"
    if best.scheme.granularity == BLOCK_128:
        return "every packed dimension is a multiple of 128"
    return f"what {names} can load"


def _try(choice: Scheme, request: Request, packed: Packed, facts: ModelFacts, sizes: tuple[int, ...]) -> _Trial:
    held = _held(choice.granularity, packed)
    storage = Storage(
        choice.quant_method,
        choice.format,
        choice.granularity,
        choice.activations,
        powers_of_two=choice.scale_rounding != ScaleRounding.NONE,
        spelling=spelling_of(request, choice.quant_method, choice.granularity),
    )
    case = Case(storage, Weights(held), facts, sizes, parse_gpu(request.gpu), ep=request.ep or 1)
    verdicts = [judge_engine(find_engine(target), case) for target in request.targets]
    refusals = {
        verdict.engine: verdict.reason
        for verdict in verdicts
        if verdict.loads is False or (verdict.tp and verdict.reason)
    }
    remedies = {verdict.engine: verdict.remedy for verdict in verdicts}
    if packed and not held:
        refusals = dict.fromkeys(map(id_of, request.targets), f"no weight fits {choice.granularity} scales")
    return _Trial(choice, len(packed) - len(held), refusals, remedies)


def _held(granularity: Granularity, packed: Packed) -> Packed:
    """Return the weights whose shapes fit the scales, without those that engines fuse with one that does not."""
    broken = {together(spec.name) or spec.name for spec, _ in packed if shape_problem(spec.shape, granularity)}
    return [(spec, role) for spec, role in packed if (together(spec.name) or spec.name) not in broken]


def _blockers(trials: Sequence[_Trial], target: str) -> str:
    """Why a target loads none of the schemes: each reason with the schemes it is of, or the only one."""
    known = [trial for trial in trials if trial.scheme in (FP8_BLOCK, FP8_DYNAMIC, MXFP8)] or trials[:1]
    blockers: dict[str, list[str]] = {}
    for trial in known:
        blockers.setdefault(trial.refusals[target], []).append(trial.scheme.name)
    if len(blockers) == 1:
        return next(iter(blockers))
    return "; ".join(f"{' and '.join(names)}: {reason}" for reason, names in blockers.items())


def _conflict(trials: Sequence[_Trial], targets: Sequence[str]) -> RecipeError:
    """Return the error of a target that loads no scheme, or of two that exclude each other."""
    loaded = {target: [trial for trial in trials if target not in trial.refusals] for target in targets}
    for target in targets:
        if not loaded[target]:
            reasons = _blockers(trials, target)
            return RecipeError(f"{NAMES[target]} loads no scheme of this model: {reasons}", trials[0].remedies[target])
    for one, other in combinations(targets, 2):
        if not any(trial in loaded[other] for trial in loaded[one]):
            of_one, of_other = loaded[other][0].refusals[one], loaded[one][0].refusals[other]
            both = f"{NAMES[one]} ({of_one}) and {NAMES[other]} ({of_other})"
            return RecipeError(f"no scheme works for both {both}", _PACK_TWICE)
    return RecipeError(f"no scheme works for {', '.join(NAMES[target] for target in targets)} at once", _PACK_TWICE)
