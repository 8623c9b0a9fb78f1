"""Makes the plan: from decisions and a recipe to the tensors of each output shard, from headers alone."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fp8pack.engines.case import make_case
from fp8pack.engines.judge import check_targets, judge_engines, module_facts, tied_heads
from fp8pack.engines.module_names import spellings
from fp8pack.errors import InputError, RecipeError
from fp8pack.modelfacts.contents import Contents, Quantized
from fp8pack.modelfacts.experts import JoinedExperts, join_experts
from fp8pack.modelfacts.fused import fused_module
from fp8pack.modelfacts.model import ModelFacts
from fp8pack.modelfacts.patterns import ignoring, star
from fp8pack.modelfacts.roles import LINEAR_ROLES, UNKNOWN_LINEAR, is_wide, judge, layer_of
from fp8pack.modelfacts.spec import DTYPE_BITS, ELEMENT_BITS, FLOAT_DTYPES, TORCH_NAMES, Stored, TensorSpec
from fp8pack.modelfacts.storage import Storage
from fp8pack.numerics.granularity import MX
from fp8pack.numerics.rounding import ScaleRounding
from fp8pack.numerics.swizzle import TILE
from fp8pack.planning.activation_scales import NO_KV_CACHE, ActivationScale, ActivationScales, Observed
from fp8pack.planning.calibration import Calibration
from fp8pack.planning.carry import activation_scales, agree, can_carry
from fp8pack.planning.choose_scheme import choose_scheme
from fp8pack.planning.compensate import compensate_tensors
from fp8pack.planning.decide import Decision, granularity_of, not_quantized, settle
from fp8pack.planning.layout import Output, arrange
from fp8pack.planning.plan import Action, ExpertPart, Packing, PackPlan, Plan, QuantMethod, TensorPlan
from fp8pack.planning.recipe import USUAL_GRANULARITY, Recipe, Request, parse_scheme, resolve, selection_of
from fp8pack.planning.sizes import SIZES, Sizes
from fp8pack.units import ceil_div

UNKNOWN_SHARE = 0.05


def choose_recipe(
    decisions: Sequence[Decision], facts: ModelFacts, request: Request, calibration: Calibration | None = None
) -> Recipe:
    """Return the recipe: the scheme asked for, or the one that `auto` chooses for these shapes and this model.

    Raises:
        RecipeError: a scheme is not known, calibrated scales are asked for without a calibration, or a calibration is
            given that is not used.
    """
    packed = [(decision.spec, decision.role) for decision in decisions if decision.packed]
    usual = USUAL_GRANULARITY.get(request.quant_method or "")
    if usual and request.granularity is None and parse_scheme(request.scheme) is None:
        request = replace(request, granularity=usual)
    is_diffusion = not facts.architecture and any(decision.role == "conditioning" for decision in decisions)
    scheme, reason = choose_scheme(request, packed, facts, is_diffusion=is_diffusion)
    return resolve(request, scheme, reason, calibration)


def make_plan(  # noqa: PLR0913
    decisions: Sequence[Decision],
    contents: Contents,
    request: Request,
    *,
    recipe: Recipe,
    method: QuantMethod,
    max_shard_nbytes: int | None = None,
    sizes: Sizes = SIZES,
) -> PackPlan:
    """Return the plan of packing the tensors of a checkpoint, or of converting those that are quantized.

    Raises:
        RecipeError: nothing is left to pack, or a named target cannot load the result.
        InputError: the source already has a tensor with the name of a scale, or the calibration lacks a weight.
    """
    planner = _Planner(recipe, method, contents, sizes)
    tensors = agree([planner.plan(decision) for decision in settle(decisions, contents, recipe, method, sizes)])
    if not any(tensor.packing for tensor in tensors):
        raise _nothing_to_pack(tensors)
    keeps_inputs = contents.activations == "static" and request.activations is None and request.scheme == "auto"
    notes: list[str] = []
    if recipe.rounding == "compensated" and recipe.calibration is not None:
        compensated = compensate_tensors(tensors, recipe.calibration)
        tensors, notes = compensated.tensors, compensated.notes
    tensors, scale_notes = _calibrate(
        tensors, recipe, method, inputs=recipe.activations == "static" and not keeps_inputs
    )
    tensors += activation_scales(tensors, contents, recipe, method)
    tensors = _mark(tensors, recipe.storage, method)
    _check_names(tensors)
    packed = [(tensor.spec, tensor.role) for tensor in tensors if tensor.packing]
    ignored = _ignored_modules(tensors, contents.facts)
    case = make_case(
        recipe.storage, packed, contents.facts, tp=request.tp, ep=request.ep, gpu=request.gpu, ignored=ignored
    )
    engines = judge_engines(case, request.targets)
    check_targets(engines, recipe.storage, request.targets, strict=request.strict_target)
    metadata = method.metadata(tensors, recipe.storage)
    shards = arrange(_outputs(tensors), max_shard_nbytes)
    return PackPlan(
        contents.facts,
        tuple(tensors),
        tuple(replace(shard, metadata=metadata) for shard in shards),
        recipe.as_data(),
        selection_of(request),
        (*([] if contents.storage else _warnings(tensors)), *notes, *scale_notes),
        recipe,
        engines,
        ignored,
        request.targets,
        request.tp,
        request.ep,
    )


def make_unpack_plan(
    contents: Contents, dtype: str, *, max_shard_nbytes: int | None = None, sizes: Sizes = SIZES
) -> Plan:
    """Return the plan of turning every quantized tensor of a checkpoint into floats of a dtype (BF16, F16, F32)."""
    unquantized = not_quantized(contents)
    tensors = [
        _join(joined, contents, dtype, sizes)
        for joined in join_experts(
            contents.tensors, contents.facts.model_type, module_facts(contents.facts).fused_layouts
        )
        if len({_stored_dtype(spec, contents, dtype) for spec, _ in joined.parts}) == 1
    ]
    done = {part.spec.name for tensor in tensors for part in tensor.parts}
    for spec in contents.tensors:
        if spec.name in contents.other_scales or spec.name in done:
            continue
        quantized = contents.quantized.get(spec.name)
        role = judge(replace(spec, dtype="BF16"), contents.facts).role
        if quantized is None:
            tensors.append(_copy(spec, role, unquantized, sizes))
        else:
            tensors.append(_unpack(spec, role, f"{quantized.kind} in the source", quantized, dtype, sizes))
    _check_names(tensors)
    shards = arrange(_outputs(tensors), max_shard_nbytes)
    inputs = [quantized.input_scale.name for quantized in contents.quantized.values() if quantized.input_scale]
    scales = [*inputs, *(spec.name for spec in contents.kv_scales.values()), *contents.other_scales]
    notes = [f"{len(scales)} activation scales are dropped, such as {scales[0]}"] if scales else []
    return Plan(contents.facts, tuple(tensors), shards, {"unpack": dtype}, {}, tuple(notes))


@dataclass(frozen=True, slots=True)
class _Planner:
    """Turns decisions into plans of tensors."""

    recipe: Recipe
    method: QuantMethod
    contents: Contents
    sizes: Sizes

    def plan(self, decision: Decision) -> TensorPlan:
        spec, quantized = decision.spec, self.contents.quantized.get(decision.spec.name)
        if not decision.packed:
            return self._keep(decision, quantized)
        granularity = granularity_of(decision, self.recipe)
        format = (decision.rule.format if decision.rule else None) or self.recipe.format
        rounding = self.recipe.scale_rounding
        rounding = ScaleRounding.UP if granularity == MX and rounding == ScaleRounding.NONE else rounding
        tiled = self.method.is_tiled(granularity)
        packing = Packing(
            format,
            granularity,
            rounding,
            self.method.scale(spec, granularity),
            fused_module(spec.name) or spec.name,
            tiled=tiled,
            searched=self.recipe.scales == "mse" and rounding == ScaleRounding.NONE,
        )
        if quantized is not None:
            carried = can_carry(spec, quantized, packing, powers_of_two=self.contents.powers_of_two)
            packing = replace(packing, carried=carried)
        rows, cols = _band_shape(spec, granularity.rows or 1, granularity.cols or 1, self.sizes)
        if tiled:
            rows, cols = ceil_div(rows, TILE[0]) * TILE[0], spec.shape[1]
        data = self.method.payload(spec, format)
        return TensorPlan(spec, Action.PACKED, decision.role, decision.reason, data, rows, cols, packing, quantized)

    def _keep(self, decision: Decision, quantized: Quantized | None) -> TensorPlan:
        spec, role, reason, kept = decision.spec, decision.role, decision.reason, self.recipe.kept_dtype
        before = quantized.source_dtype if quantized else spec.dtype
        after = TORCH_NAMES[kept] if kept and before in FLOAT_DTYPES else before
        if after != before and (why := self._why_not_cast(spec, role)):
            after, reason = before, f"{reason}; not cast: {why}"
        if quantized is not None:
            return _unpack(spec, role, reason, quantized, after, self.sizes)
        return (
            _copy(spec, role, reason, self.sizes) if after == before else _cast(spec, role, reason, after, self.sizes)
        )

    def _why_not_cast(self, spec: TensorSpec, role: str) -> str:
        """Why a float keeps the dtype of the source whatever is asked for, empty if nothing speaks against a cast."""
        if spec.name in self.contents.other_scales:
            return "a scale"
        if module_facts(self.contents.facts).widens(spec.name):
            return "transformers keeps it in float32"
        return "engines keep it in float32" if role == "rotary" or is_wide(spec.name) else ""


def _cast(spec: TensorSpec, role: str, reason: str, dtype: str, sizes: Sizes) -> TensorPlan:
    """Cast a tensor; its bands are as long in the output as those of a copy."""
    data = Stored(spec.name, dtype, spec.shape)
    return TensorPlan(spec, Action.CAST, role, reason, data, sizes.band * 8 // DTYPE_BITS[dtype])


def _copy(spec: TensorSpec, role: str, reason: str, sizes: Sizes) -> TensorPlan:
    return TensorPlan(spec, Action.COPIED, role, reason, Stored(spec.name, spec.dtype, spec.shape), sizes.band)


def _unpack(spec: TensorSpec, role: str, reason: str, quantized: Quantized, dtype: str, sizes: Sizes) -> TensorPlan:
    rows, cols = _band_shape(spec, 1, 1, sizes)
    data = Stored(spec.name, dtype, spec.shape)
    return TensorPlan(spec, Action.UNPACKED, role, reason, data, rows, cols, quantized=quantized)


def _join(joined: JoinedExperts, contents: Contents, dtype: str, sizes: Sizes) -> TensorPlan:
    """Put the experts of a layer together, as the class of the model stores them."""
    spec, quantized = joined.whole, contents.quantized
    parts = tuple(ExpertPart(part, view, quantized.get(part.name)) for part, view in joined.parts)
    rows, cols = spec.matrix
    row_nbytes = 4 * cols
    data = Stored(spec.name, _stored_dtype(joined.parts[0][0], contents, dtype), spec.shape)
    reason = "experts put together, as the class stores them"
    step = min(rows, max(1, sizes.band // row_nbytes))
    return TensorPlan(spec, Action.UNPACKED, "experts", reason, data, step, cols, parts=parts)


def _stored_dtype(spec: TensorSpec, contents: Contents, dtype: str) -> str:
    return dtype if spec.name in contents.quantized else spec.dtype


def _nothing_to_pack(tensors: Sequence[TensorPlan]) -> RecipeError:
    """The error, with the commonest reason; an option in it becomes the hint."""
    reasons = [tensor.reason for tensor in tensors if len(tensor.spec.shape) == 2]
    dragged = [reason for reason in reasons if reason.startswith("ignored with")]
    sentence = "nothing to pack: no linear weight is left to quantize"
    if not reasons:
        return RecipeError(sentence)
    [(reason, count)] = Counter(dragged or reasons).most_common(1)
    why, remedy, option = reason.partition(": --")
    words = re.sub(r"(?<![\w-])--(?=[a-z])", "", why)
    hint = f"--{option.rstrip(')')}" if remedy else ""
    return RecipeError(f"{sentence}; {count} matrices: {words}{')' if option.endswith(')') else ''}", hint)


def _mark(tensors: Sequence[TensorPlan], storage: Storage, method: QuantMethod) -> list[TensorPlan]:
    """Add the small tensors that declare FP8 weights, if the quant method has them."""
    marked = []
    first = next((tensor for tensor in tensors if tensor.packing), None)
    for tensor in tensors:
        if tensor.packing is None:
            marked.append(tensor)
            continue
        own = replace(storage, format=tensor.packing.format, granularity=tensor.packing.granularity)
        markers = method.markers(tensor.spec, own, is_first=tensor is first)
        marked.append(replace(tensor, markers=markers))
    return marked


def _calibrate(
    tensors: list[TensorPlan], recipe: Recipe, method: QuantMethod, *, inputs: bool
) -> tuple[list[TensorPlan], list[str]]:
    """Add activation scales to the tensors that they are stored with; return also notes.

    inputs: whether the input scales of weights are among them.
    """
    if recipe.calibration is None:
        return tensors, []
    scales = ActivationScales(recipe.calibration, recipe.activation_options, recipe.format)
    added: dict[str, list[ActivationScale]] = {}
    notes = (
        [] if recipe.calibration.fingerprint else ["the calibration file names no model; it must be one of this model"]
    )
    if recipe.activation_options.percentile is not None:
        notes.append("activations above the percentile are clipped, which usually lowers accuracy; the default is amax")
    if recipe.kv_cache:
        roles = {tensor.spec.name: tensor.role for tensor in tensors}
        added |= scales.of_kv_cache(roles, method.kv_scale)
    if inputs:
        weights = [(tensor.spec.name, method.input_scale(tensor.spec.name)) for tensor in tensors if tensor.packing]
        found = scales.of_inputs(weights)
        for name, (scale, _) in found.items():
            added[name] = [scale, *added.get(name, [])]
        notes += _calibration_notes({name: observed for name, (_, observed) in found.items()})
    return [replace(tensor, activations=tuple(added.get(tensor.spec.name, ()))) for tensor in tensors], notes


def _calibration_notes(inputs: dict[str, Observed]) -> list[str]:
    notes = []
    spikes = [name for name, observed in inputs.items() if observed.has_spike]
    if spikes:
        notes.append(
            f"input activations of {len(spikes)} weights have outliers (amax > 10x the 99.9th percentile), such as "
            f"{', '.join(spikes[:3])}: --ignore keeps them in BF16, --scheme FP8_DYNAMIC scales each token"
        )
    for source, whose in (("peers", "the other experts of the layer"), ("all_experts", "a run of all tokens")):
        if names := [name for name, observed in inputs.items() if observed.source == source]:
            more = ": calibrate with more prompts or --all-experts" if source == "peers" else ""
            notes.append(
                f"{len(names)} expert weights got too few tokens; their input scales are from {whose}, such as "
                f"{', '.join(names[:3])}{more}"
            )
    return notes


def _band_shape(spec: TensorSpec, rows: int, cols: int, sizes: Sizes) -> tuple[int, int]:
    """Whole regions, about a band of source: all columns of as many rows as fit, or a part of one row of regions."""
    k, itemsize = spec.matrix[1], max(1, ELEMENT_BITS[spec.dtype] // 8)
    if rows * k * itemsize > sizes.granule:
        return rows, max(1, sizes.band // (rows * itemsize * cols)) * cols
    return max(1, sizes.band // max(1, rows * k * itemsize)) * rows, max(1, k)


def _check_names(tensors: Sequence[TensorPlan]) -> None:
    """Refuse a source that already has a tensor with the name of a scale or marker."""
    names = {tensor.data.name for tensor in tensors}
    for tensor in tensors:
        if tensor.packing and tensor.packing.scale.name in names:
            raise _taken(tensor.packing.scale, ignoring(tensor.spec.name))
        for activation in tensor.activations:
            if activation.stored.name in names:
                hint = ignoring(tensor.spec.name) if activation.kind == "input" else NO_KV_CACHE
                raise _taken(activation.stored, hint)
        for marker in tensor.markers:
            if marker.stored.name in names:
                raise _taken(marker.stored, ignoring(tensor.spec.name))


def _taken(stored: Stored, hint: str) -> InputError:
    return InputError(f"{stored.name} is already a tensor of the source", hint)


def _outputs(tensors: Sequence[TensorPlan]) -> list[Output]:
    """The output of each tensor; scales that are passed through are stored in the shard of their weight."""
    names = {tensor.spec.name for tensor in tensors}
    beside: dict[str, list[Stored]] = {}
    for tensor in tensors:
        if tensor.beside in names:
            beside.setdefault(tensor.beside, []).append(tensor.data)
    return [
        Output(
            tensor.spec,
            tensor.data,
            tensor.packing.scale if tensor.packing else None,
            (*(constant.stored for constant in tensor.constants), *beside.get(tensor.spec.name, ())),
        )
        for tensor in tensors
        if tensor.beside not in names
    ]


def _ignored_modules(tensors: Sequence[TensorPlan], facts: ModelFacts) -> tuple[str, ...]:
    """The modules that engines would load as FP8 linears unless they are ignored: all but norms and embeddings."""
    built = module_facts(facts)
    changed = built.converted | built.joined | built.fused | built.linears
    kept = [tensor for tensor in tensors if tensor.packing is None]
    ignored = [
        tensor.spec.name.removesuffix(".weight")
        for tensor in kept
        if star(tensor.spec.name.removesuffix(".weight")) in changed
        or tensor.role == "experts"
        or (
            tensor.role not in ("norm", "embedding", "bias", "rotary")
            and tensor.spec.name.endswith(".weight")
            and len(tensor.spec.shape) == 2
        )
    ]
    ignored += [module for name in ignored for module in built.modules(name)]
    ignored += [name.rpartition(".")[0] for name in ignored if name.rpartition(".")[0].endswith("experts")]
    stored = {tensor.spec.name for tensor in tensors}
    ignored += [head for head in tied_heads(facts) if f"{head}.weight" not in stored]
    aliased = (
        facts.wrapper or "fc" in ignored or any(tensor.role in ("tower", "projector", "logits") for tensor in tensors)
    )
    names = [spelling for name in ignored for spelling in (spellings(name) if aliased else [name])]
    return tuple(dict.fromkeys(names))


def _warnings(tensors: Sequence[TensorPlan]) -> tuple[str, ...]:
    unknown = [tensor.spec for tensor in tensors if tensor.role == UNKNOWN_LINEAR and tensor.packing]
    staying = [tensor for tensor in tensors if _multiplies_unquantized(tensor)]
    warnings = []
    if sum(spec.nbytes for spec in unknown) > UNKNOWN_SHARE * sum(tensor.spec.nbytes for tensor in tensors):
        names = ", ".join(spec.name for spec in unknown[:5])
        warnings.append(
            f"{len(unknown)} quantized weights have an unknown role, such as {names}: --ignore keeps them in BF16"
        )
    stay = sum(tensor.spec.nbytes for tensor in staying)
    share = stay / max(1, stay + sum(tensor.spec.nbytes for tensor in tensors if tensor.packing))
    if share > UNKNOWN_SHARE:
        first = staying[0]
        warnings.append(
            f"{share:.0%} of the bytes of linears and experts stay as they are: {len(staying)} weights, such as"
            f" {first.spec.name} {list(first.spec.shape)} ({first.reason.removeprefix('policy: ')})"
        )
    return tuple(warnings)


def _multiplies_unquantized(tensor: TensorPlan) -> bool:
    """Say whether a weight of a block multiplies and is not quantized, though neither policy nor request means that."""
    is_matrix = tensor.role in (*LINEAR_ROLES, UNKNOWN_LINEAR, "experts", "conv1d")
    is_meant = tensor.reason.startswith(("--", "rule:", "keep_", "not ", "ignored with"))
    return tensor.packing is None and is_matrix and not is_meant and layer_of(tensor.spec.name) is not None
