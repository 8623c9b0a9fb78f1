"""Which tensors are quantized: by the policy, the patterns of the request, and the shapes."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fp8pack.errors import RecipeError
from fp8pack.modelfacts.contents import Contents
from fp8pack.modelfacts.fused import together
from fp8pack.modelfacts.patterns import Matcher, Pattern
from fp8pack.modelfacts.roles import Verdict, judge, layer_of
from fp8pack.modelfacts.spec import FLOAT_DTYPES, TensorSpec
from fp8pack.numerics.granularity import CHANNEL, Granularity
from fp8pack.planning.plan import QuantMethod
from fp8pack.planning.recipe import Recipe, Request, Rule, RuleAction
from fp8pack.planning.sizes import Sizes


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether the policy and the request quantize a tensor, before its shape is checked."""

    spec: TensorSpec
    role: str
    packed: bool
    reason: str
    rule: Rule | None = None


def decide(contents: Contents, request: Request, *, anew: bool = False) -> list[Decision]:
    """Return the decision of policy and request about each tensor; of a quantized source, its quantized weights.

    anew: the policy decides of a quantized source, too, as if its weights were floats.

    Raises:
        RecipeError: a pattern matches nothing, or a rule packs a tensor that cannot be quantized.
    """
    ignore = Matcher(request.ignore, "ignore")
    only = Matcher(request.only, "only")
    pack = Matcher(request.pack, "pack")
    rules = Matcher(tuple(rule.pattern for rule in request.rules), "rule")
    by_pattern = {rule.pattern: rule for rule in reversed(request.rules)}
    last = contents.facts.num_layers or 1 + max((layer_of(spec.name) or 0 for spec in contents.tensors), default=0)
    unquantized = "" if anew or not contents.quantized else not_quantized(contents)
    idle = {pattern for pattern in request.pack if not pattern.optional}
    keeps_towers = any(judge(_as_float(spec, contents), contents.facts).packed for spec in contents.tensors)
    decisions = []
    for spec in contents.tensors:
        names = (spec.name, *([spec.part_of.name] if spec.part_of else []))
        hits = [matcher.find(*names) for matcher in (ignore, pack, rules, only)]
        verdict = _judge(spec, contents, unquantized, keeps_towers=keeps_towers)
        decision = Decision(spec, verdict.role, verdict.packed, verdict.reason)
        layer = layer_of(spec.name)
        if hits[0]:
            decision = replace(decision, packed=False, reason=f"--ignore {hits[0].text}")
        elif hits[1]:
            decision = _overrule(decision, hits[1], f"--pack {hits[1].text}", contents)
            if decision.packed:
                idle.discard(hits[1])
        elif hits[2]:
            decision = _apply(decision, by_pattern[hits[2]], contents)
        elif (
            decision.packed
            and layer is not None
            and (layer < request.keep_first_layers or last - request.keep_last_layers <= layer < last)
        ):
            decision = replace(decision, packed=False, reason="keep_first_layers or keep_last_layers")
        if request.only and not hits[3]:
            decision = replace(decision, packed=False, reason="not matched by --only")
        decisions.append(decision)
    for matcher in (ignore, only, pack, rules):
        matcher.check()
    if idle:
        text = min(pattern.text for pattern in idle)
        raise RecipeError(
            f"pack pattern {text!r} matches no tensor that can be quantized",
            f"name 2-D float weights; --pack {shlex.quote('?' + text)} also accepts no match",
        )
    return decisions


def settle(
    decisions: Sequence[Decision], contents: Contents, recipe: Recipe, method: QuantMethod, sizes: Sizes
) -> list[Decision]:
    """Leave weights unquantized whose shape the quant method does not support, and all that engines fuse with them."""
    settled = [_check_shape(decision, contents, recipe, method, sizes) for decision in decisions]
    if recipe.quant_method != "fp8pack":
        causes: dict[str, Decision] = {}
        for decision in settled:
            group = together(decision.spec.name)
            if group and not decision.packed:
                causes.setdefault(group, decision)
        settled = [_keep_with(decision, causes.get(together(decision.spec.name) or "")) for decision in settled]
    return _rejoin(settled)


def not_quantized(contents: Contents) -> str:
    """Return why a conversion leaves a float weight of the source as it is."""
    return "not FP8 in the source" if contents.storage else "not quantized in the source"


def _judge(spec: TensorSpec, contents: Contents, unquantized: str, *, keeps_towers: bool) -> Verdict:
    """The policy's verdict or, if there is a reason to leave what is not quantized, that of the source."""
    quantized = contents.quantized.get(spec.name)
    verdict = judge(_as_float(spec, contents), contents.facts, keeps_towers=keeps_towers)
    if not unquantized:
        return verdict
    if quantized is None:
        return replace(verdict, packed=False, reason=unquantized) if verdict.packed else verdict
    is_linear = len(spec.shape) == 2 and spec.name.endswith(".weight")
    why = f"{quantized.kind} in the source" + ("" if is_linear else ", but not the weight of a linear")
    return Verdict(verdict.role, is_linear, why)


def _as_float(spec: TensorSpec, contents: Contents) -> TensorSpec:
    return replace(spec, dtype="BF16") if spec.name in contents.quantized else spec


def _apply(decision: Decision, rule: Rule, contents: Contents) -> Decision:
    if rule.action == RuleAction.KEEP:
        return replace(decision, packed=False, reason=f"rule: keep {rule.pattern.text}")
    decided = _overrule(decision, rule.pattern, f"rule: pack {rule.pattern.text}", contents)
    return replace(decided, rule=rule) if decided.packed else decided


def _overrule(decision: Decision, pattern: Pattern, reason: str, contents: Contents) -> Decision:
    """Quantize what a pattern matches: a name must be of a matrix, a glob or regular expression skips the rest."""
    spec = decision.spec
    has_values = spec.dtype in FLOAT_DTYPES or spec.name in contents.quantized
    if len(spec.shape) == 2 and has_values and 0 not in spec.shape and spec.name.endswith(".weight"):
        return replace(decision, packed=True, reason=reason)
    if pattern.exact:
        option = f"--pack {shlex.quote(pattern.text)}" if reason.startswith("--pack") else "the rule"
        raise RecipeError(
            f"{spec.name} is {spec.dtype} {list(spec.shape)}, and only 2-D float weights can be quantized",
            f"leave out {option}",
        )
    return decision


def _rejoin(decisions: Sequence[Decision]) -> list[Decision]:
    """Join fused experts again unless one of their parts is quantized."""
    split = {decision.spec.part_of.name for decision in decisions if decision.spec.part_of and decision.packed}
    whole: dict[str, Decision] = {}
    for decision in decisions:
        fused = decision.spec.part_of
        if fused is None or fused.name in split or _is_bias_of(fused.name, split):
            whole[decision.spec.name] = decision
        else:
            whole.setdefault(fused.name, replace(decision, spec=fused, role="experts"))
    return list(whole.values())


def _is_bias_of(name: str, split: set[str]) -> bool:
    return name.endswith("_bias") and name.removesuffix("_bias") in split


def _check_shape(decision: Decision, contents: Contents, recipe: Recipe, method: QuantMethod, sizes: Sizes) -> Decision:
    if not decision.packed:
        return decision
    if 0 in decision.spec.shape:
        return replace(decision, packed=False, reason="empty")
    granularity = granularity_of(decision, recipe)
    quantized = contents.quantized.get(decision.spec.name)
    if quantized and quantized.granularity == granularity and granularity.rows != 1:
        return decision  # whole tensors and blocks, with the same edges in the source
    row_nbytes = decision.spec.nbytes // decision.spec.shape[0]
    if granularity == CHANNEL and row_nbytes > sizes.granule:
        return replace(
            decision, packed=False, reason=f"a row of {row_nbytes >> 20} MiB is too long for a channel scale"
        )
    problem = method.problem(decision.spec.shape, granularity)
    return replace(decision, packed=False, reason=problem) if problem else decision


def _keep_with(decision: Decision, cause: Decision | None) -> Decision:
    if cause is None or not decision.packed:
        return decision
    leaf = cause.spec.name.removesuffix(".weight").rpartition(".")[2]
    return replace(decision, packed=False, reason=f"ignored with {leaf}: engines fuse the two ({cause.reason})")


def granularity_of(decision: Decision, recipe: Recipe) -> Granularity:
    """Return the granularity of a rule, or else the recipe's."""
    return (decision.rule.granularity if decision.rule else None) or recipe.granularity
