"""The plan: every decision about every tensor, from headers alone. Nothing after it looks at a tensor's name."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Protocol

from fp8pack.errors import InputError, RecipeError
from fp8pack.numerics.formats import Float8Format
from fp8pack.numerics.granularity import CHANNEL, MX, TENSOR, Granularity
from fp8pack.numerics.scaling import ScaleRounding
from fp8pack.planning.activation_scales import ActivationScale, ActivationScales, Kind, Observed
from fp8pack.planning.calibration import Calibration
from fp8pack.planning.engines import EngineVerdict, check_targets, choose_scheme, judge_engines
from fp8pack.planning.layout import Output, ShardPlan, Stored, arrange
from fp8pack.planning.model import ModelFacts
from fp8pack.planning.patterns import Matcher, Pattern
from fp8pack.planning.policy import UNKNOWN_LINEAR, fused_module, judge, layer_of, spellings, together
from fp8pack.planning.recipe import Recipe, Request, Rule, RuleAction, resolve
from fp8pack.planning.spec import FLOAT_DTYPES, TensorSpec
from fp8pack.units import ceil_div

BAND_NBYTES = 8 << 20
MAX_GRANULE_NBYTES = 16 << 20  # rows of one region above this are cut into columns
UNKNOWN_SHARE = 0.05


class Action(StrEnum):
    """What happens to a tensor."""

    PACKED = "packed"
    COPIED = "copied"


@dataclass(frozen=True, slots=True)
class Packing:
    """How a weight [N, K] is packed; `scale_group` names the tensors that share a tensor-wide scale."""

    format: Float8Format
    granularity: Granularity
    rounding: ScaleRounding
    scale: Stored
    scale_group: str

    @property
    def two_pass(self) -> bool:
        """Whether a scale spans bands, so that amax must be known before the first byte is written."""
        return self.granularity == TENSOR


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """The decision about one tensor, and its bands: the units of work, digest and resume.

    A band has `band_rows` rows and `band_cols` columns of a packed weight, all columns unless its rows are very long;
    of anything copied, `band_rows` bytes.
    """

    spec: TensorSpec
    action: Action
    role: str
    reason: str
    band_rows: int
    band_cols: int = 1
    packing: Packing | None = None
    activations: tuple[ActivationScale, ...] = ()

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of a packed weight, bytes and 1 of anything copied."""
        return (self.spec.shape[0], self.spec.shape[1]) if self.packing else (self.spec.nbytes, 1)

    @property
    def num_bands(self) -> int:
        """Bands that make up the tensor; an empty tensor has none."""
        rows, cols = self.matrix
        return ceil_div(rows, self.band_rows) * ceil_div(cols, self.band_cols)


@dataclass(frozen=True, slots=True)
class PackPlan:
    """What packing a checkpoint will do: the recipe, each tensor, each output shard, and who can load it."""

    recipe: Recipe
    facts: ModelFacts
    tensors: tuple[TensorPlan, ...]
    shards: tuple[ShardPlan, ...]
    engines: tuple[EngineVerdict, ...]
    kept_linears: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def source_nbytes(self) -> int:
        """Bytes of all source tensors."""
        return sum(tensor.spec.nbytes for tensor in self.tensors)

    @property
    def output_nbytes(self) -> int:
        """Bytes of all output tensors."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def packed(self) -> tuple[TensorPlan, ...]:
        """The tensors that are packed."""
        return tuple(tensor for tensor in self.tensors if tensor.action == Action.PACKED)


class QuantMethod(Protocol):
    """An on-disk convention, as far as the plan needs it; `checkpoint/quant_methods/` holds one file for each."""

    @property
    def name(self) -> str:
        """The value of `quantization_config.quant_method`."""
        ...

    def check(self, recipe: Recipe, rules: Sequence[Rule]) -> None:
        """Raise RecipeError when the convention cannot express the recipe."""
        ...

    def problem(self, shape: tuple[int, ...], granularity: Granularity) -> str | None:
        """Return why no engine reads a weight of this shape in this convention, None if engines do."""
        ...

    def scale(self, spec: TensorSpec, granularity: Granularity) -> Stored:
        """Return name, dtype and shape of the scale tensor beside a weight."""
        ...

    def input_scale(self, name: str) -> Stored:
        """Return name, dtype and shape of the static scale of what enters a weight."""
        ...

    def kv_scale(self, attention: str, kind: Kind, owner: str) -> Stored:
        """Return name, dtype and shape of the scale of K or V of an attention; `owner` is the weight that makes it."""
        ...


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether the policy and the rules want a tensor packed, before its shape is held against the recipe."""

    spec: TensorSpec
    role: str
    packed: bool
    reason: str
    rule: Rule | None = None


def decide(specs: Sequence[TensorSpec], facts: ModelFacts, request: Request) -> list[Decision]:
    """Return what the policy and the request's rules say of each tensor.

    Raises:
        RecipeError: a pattern matches nothing, or a rule packs what cannot be packed.
    """
    ignore = Matcher(request.ignore, "--ignore")
    only = Matcher(request.only, "--only")
    pack = Matcher(request.pack, "--pack")
    rules = Matcher(tuple(rule.pattern for rule in request.rules), "rule")
    by_pattern = {rule.pattern: rule for rule in reversed(request.rules)}
    last = facts.num_layers or 1 + max((layer_of(spec.name) or 0 for spec in specs), default=0)
    idle = {pattern for pattern in request.pack if not pattern.optional}
    decisions = []
    for spec in specs:
        hits = ignore.find(spec.name), pack.find(spec.name), rules.find(spec.name), only.find(spec.name)
        verdict = judge(spec, facts)
        decision = Decision(spec, verdict.role, verdict.packed, verdict.reason)
        layer = layer_of(spec.name)
        if hits[0]:
            decision = replace(decision, packed=False, reason=f"--ignore {hits[0].text}")
        elif hits[1]:
            decision = _overrule(decision, hits[1], f"--pack {hits[1].text}")
            if decision.packed:
                idle.discard(hits[1])
        elif hits[2]:
            decision = _apply(decision, by_pattern[hits[2]])
        elif (
            decision.packed
            and layer is not None
            and not request.keep_first_layers <= layer < last - request.keep_last_layers
        ):
            decision = replace(decision, packed=False, reason="recipe: first and last layers stay")
        if request.only and not hits[3]:
            decision = replace(decision, packed=False, reason="not named by --only")
        decisions.append(decision)
    for matcher in (ignore, only, pack, rules):
        matcher.check()
    if idle:
        raise RecipeError(f"--pack {min(pattern.text for pattern in idle)!r} matches nothing that can be packed")
    return decisions


def choose_recipe(
    decisions: Sequence[Decision], facts: ModelFacts, request: Request, calibration: Calibration | None = None
) -> Recipe:
    """Return the recipe: the scheme asked for, or the one that `auto` finds right for these shapes and this model.

    Raises:
        RecipeError: a scheme is not known, scales of activations are asked for without a calibration, or a calibration
            that nothing is asked of.
    """
    packed = [(decision.spec, decision.role) for decision in decisions if decision.packed]
    scheme, reason = choose_scheme(request, packed, facts)
    return resolve(request, scheme, reason, calibration)


def make_plan(
    decisions: Sequence[Decision],
    facts: ModelFacts,
    request: Request,
    *,
    recipe: Recipe,
    method: QuantMethod,
    max_shard_nbytes: int | None = None,
) -> PackPlan:
    """Return the plan of packing these tensors.

    Raises:
        RecipeError: a convention cannot express the recipe, nothing is left to pack, or a named target cannot load
            the result.
        InputError: the source holds a tensor that bears the name of a scale, or the calibration does not fit it.
    """
    method.check(recipe, request.rules)
    settled = _settle(decisions, recipe, method)
    tensors = tuple(_plan_tensor(decision, recipe, method) for decision in settled)
    if not any(tensor.packing for tensor in tensors):
        reasons = [tensor.reason for tensor in tensors if len(tensor.spec.shape) == 2]
        dragged = [reason for reason in reasons if reason.startswith("kept with")]
        common = Counter(dragged or reasons).most_common(1)
        why = f"; {common[0][1]} matrices: {common[0][0]}" if common else ""
        raise RecipeError(
            f"nothing to pack: no tensor is a linear weight that the policy and the rules let be packed{why}"
        )
    tensors, notes = _calibrate(tensors, recipe, method)
    _check_scale_names(tensors)
    packed = [(tensor.spec, tensor.role) for tensor in tensors if tensor.packing]
    engines = judge_engines(recipe.storage, packed, facts, tp=request.tp, gpu=request.gpu)
    check_targets(engines, recipe.storage, request.targets)
    return PackPlan(
        recipe,
        facts,
        tensors,
        arrange([_output(tensor) for tensor in tensors], max_shard_nbytes),
        engines,
        _kept_linears(tensors, facts),
        (*_warnings(tensors), *notes),
    )


def _apply(decision: Decision, rule: Rule) -> Decision:
    if rule.action == RuleAction.KEEP:
        return replace(decision, packed=False, reason=f"rule: keep {rule.pattern.text}")
    return _overrule(decision, rule.pattern, f"rule: pack {rule.pattern.text}", rule)


def _overrule(decision: Decision, pattern: Pattern, reason: str, rule: Rule | None = None) -> Decision:
    """Pack what a pattern means: a name must mean a matrix, a glob or expression passes over everything else."""
    spec = decision.spec
    if len(spec.shape) == 2 and spec.dtype in FLOAT_DTYPES and 0 not in spec.shape and spec.name.endswith(".weight"):
        return replace(decision, packed=True, reason=reason, rule=rule)
    if pattern.exact:
        raise RecipeError(
            f"{spec.name}: {spec.dtype} {list(spec.shape)} cannot be packed ({reason}): only 2-D float weights can"
        )
    return decision


def _settle(decisions: Sequence[Decision], recipe: Recipe, method: QuantMethod) -> list[Decision]:
    """Keep what the convention cannot hold, and with it everything that engines fuse it with."""
    settled = [_check_shape(decision, recipe, method) for decision in decisions]
    if recipe.quant_method == "fp8pack":
        return settled
    kept: dict[str, Decision] = {}
    for decision in settled:
        group = together(decision.spec.name)
        if group and not decision.packed:
            kept.setdefault(group, decision)
    return [_keep_with(decision, kept.get(together(decision.spec.name) or "")) for decision in settled]


def _check_shape(decision: Decision, recipe: Recipe, method: QuantMethod) -> Decision:
    if not decision.packed:
        return decision
    if 0 in decision.spec.shape:
        return replace(decision, packed=False, reason="empty")
    granularity = _granularity(decision, recipe)
    row_nbytes = decision.spec.nbytes // decision.spec.shape[0]
    if granularity == CHANNEL and row_nbytes > MAX_GRANULE_NBYTES:
        return replace(
            decision, packed=False, reason=f"a row of {row_nbytes >> 20} MiB is too long for a channel scale"
        )
    problem = method.problem(decision.spec.shape, granularity)
    return replace(decision, packed=False, reason=problem) if problem else decision


def _keep_with(decision: Decision, cause: Decision | None) -> Decision:
    if cause is None or not decision.packed:
        return decision
    leaf = cause.spec.name.removesuffix(".weight").rpartition(".")[2]
    return replace(decision, packed=False, reason=f"kept with {leaf}, which engines fuse it with ({cause.reason})")


def _granularity(decision: Decision, recipe: Recipe) -> Granularity:
    return (decision.rule.granularity if decision.rule else None) or recipe.granularity


def _plan_tensor(decision: Decision, recipe: Recipe, method: QuantMethod) -> TensorPlan:
    spec = decision.spec
    if not decision.packed:
        return TensorPlan(spec, Action.COPIED, decision.role, decision.reason, BAND_NBYTES)
    granularity = _granularity(decision, recipe)
    format = (decision.rule.format if decision.rule else None) or recipe.format
    rounding = (
        ScaleRounding.UP if granularity == MX and recipe.scale_rounding == ScaleRounding.NONE else recipe.scale_rounding
    )
    packing = Packing(
        format, granularity, rounding, method.scale(spec, granularity), fused_module(spec.name) or spec.name
    )
    rows, cols = _band_shape(spec, granularity)
    return TensorPlan(spec, Action.PACKED, decision.role, decision.reason, rows, cols, packing)


def _calibrate(
    tensors: tuple[TensorPlan, ...], recipe: Recipe, method: QuantMethod
) -> tuple[tuple[TensorPlan, ...], list[str]]:
    """Add the scales of activations to the tensors that they are stored beside; return also what is worth knowing."""
    if recipe.calibration is None:
        return tensors, []
    scales = ActivationScales(recipe.calibration, recipe.activation_options, recipe.format)
    added: dict[str, list[ActivationScale]] = {}
    notes = [] if recipe.calibration.fingerprint else ["the calibration does not say which model it is of"]
    if recipe.activation_options.percentile is not None:
        notes.append("--percentile clips what lies above it, which mostly costs FP8 accuracy: amax is the default")
    if recipe.kv_cache:
        roles = {tensor.spec.name: tensor.role for tensor in tensors}
        added |= scales.of_kv_cache(roles, method.kv_scale)
    if recipe.activations == "static":
        weights = [(tensor.spec.name, method.input_scale(tensor.spec.name)) for tensor in tensors if tensor.packing]
        inputs = scales.of_inputs(weights)
        for name, (scale, _) in inputs.items():
            added[name] = [scale, *added.get(name, [])]
        notes += _calibration_notes({name: observed for name, (_, observed) in inputs.items()})
    return tuple(replace(tensor, activations=tuple(added.get(tensor.spec.name, ()))) for tensor in tensors), notes


def _calibration_notes(inputs: dict[str, Observed]) -> list[str]:
    notes = []
    spikes = [name for name, observed in inputs.items() if observed.has_spike]
    if spikes:
        notes.append(
            f"what enters {len(spikes)} weights has an amax over ten times what 99.9 % stay below, such as "
            f"{', '.join(spikes[:3])}: --ignore keeps them in BF16, --scheme FP8_DYNAMIC scales each token"
        )
    for source, whose in (("peers", "their peers"), ("all_experts", "the run of all tokens")):
        if names := [name for name, observed in inputs.items() if observed.source == source]:
            more = ": calibrate with more prompts or --all-experts" if source == "peers" else ""
            notes.append(
                f"{len(names)} weights of experts saw too few tokens, so their scales are of {whose}, such as "
                f"{', '.join(names[:3])}{more}"
            )
    return notes


def _band_shape(spec: TensorSpec, granularity: Granularity) -> tuple[int, int]:
    """Whole regions, about 8 MiB of source: all columns of as many rows as fit, or a part of one row of regions."""
    (n, k), rows, cols = spec.shape, granularity.rows or 1, granularity.cols or 1
    itemsize = spec.nbytes // (n * k)
    if rows * k * itemsize > MAX_GRANULE_NBYTES:
        return rows, max(1, BAND_NBYTES // (rows * itemsize * cols)) * cols
    return max(1, BAND_NBYTES // (rows * k * itemsize)) * rows, k


def _check_scale_names(tensors: Sequence[TensorPlan]) -> None:
    names = {tensor.spec.name for tensor in tensors}
    for tensor in tensors:
        if tensor.packing and tensor.packing.scale.name in names:
            raise InputError(f"{tensor.packing.scale.name} is in the source already: {_keeps(tensor)}")
        for activation in tensor.activations:
            if activation.stored.name in names:
                remedy = _keeps(tensor) if activation.kind == "input" else "pack without --kv-cache"
                raise InputError(f"{activation.stored.name} is in the source already: {remedy}")


def _keeps(tensor: TensorPlan) -> str:
    return f"--ignore {tensor.spec.name} keeps its weight"


def _output(tensor: TensorPlan) -> Output:
    activations = tuple(activation.stored for activation in tensor.activations)
    if tensor.packing is None:
        copy = Stored(tensor.spec.name, tensor.spec.dtype, tensor.spec.shape)
        return Output(tensor.spec, copy, None, activations)
    payload = Stored(tensor.spec.name, tensor.packing.format.dtype, tensor.spec.shape)
    return Output(tensor.spec, payload, tensor.packing.scale, activations)


def _kept_linears(tensors: Sequence[TensorPlan], facts: ModelFacts) -> tuple[str, ...]:
    """The modules that engines would take for FP8 linears unless they are listed: all but norms and embeddings."""
    kept = [
        tensor.spec.name.removesuffix(".weight")
        for tensor in tensors
        if tensor.packing is None
        and tensor.role not in ("norm", "embedding", "bias", "rotary")
        and (tensor.role == "experts" or (tensor.spec.name.endswith(".weight") and len(tensor.spec.shape) == 2))
    ]
    kept += [name.rpartition(".")[0] for name in kept if name.rpartition(".")[0].endswith("experts")]
    if facts.tied:
        masked = any(tensor.spec.name.startswith("cls.predictions.") for tensor in tensors)
        kept += ["lm_head", *(["cls.predictions.decoder"] if masked else [])]  # tied, so the file does not hold them
    aliased = facts.wrapper or any(tensor.role in ("tower", "projector", "logits") for tensor in tensors)
    names = [spelling for name in kept for spelling in (spellings(name) if aliased else [name])]
    return tuple(dict.fromkeys(names))


def _warnings(tensors: Sequence[TensorPlan]) -> tuple[str, ...]:
    unknown = [tensor.spec for tensor in tensors if tensor.role == UNKNOWN_LINEAR and tensor.packing]
    total = sum(tensor.spec.nbytes for tensor in tensors)
    if sum(spec.nbytes for spec in unknown) <= UNKNOWN_SHARE * total:
        return ()
    names = ", ".join(spec.name for spec in unknown[:5])
    return (
        f"{len(unknown)} packed weights have a role that fp8pack does not know, such as {names}: --ignore keeps them",
    )
