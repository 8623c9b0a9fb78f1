"""What each inference engine does with a checkpoint, decided offline from the rules in `planning/engine_rules.py`.

The rules were read in the engines' code, and no engine was run; docs/engines.md says which libraries were.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from typing import NamedTuple

from fp8pack.errors import RecipeError
from fp8pack.numerics.formats import E4M3, E5M2
from fp8pack.numerics.granularity import BLOCK_128, CHANNEL, MX, TENSOR, Granularity
from fp8pack.numerics.scaling import ScaleRounding
from fp8pack.planning.engine_rules import (
    EXPERTS,
    KV_CACHE,
    LAST_PARTS,
    ON_GPU,
    PARTIAL_BLOCKS,
    READERS,
    RENAMING,
    REPLICATED,
    ROUNDS_ON_SM100,
    WEIGHTS,
    WRAPPERS,
    Edges,
    Rule,
    find_listed,
    is_understood,
    kind_of,
    list_syntax,
    rules_for,
)
from fp8pack.planning.gpus import Gpu, parse_gpu
from fp8pack.planning.model import ModelFacts
from fp8pack.planning.policy import fused_module, together
from fp8pack.planning.recipe import FP8, FP8_BLOCK, FP8_DYNAMIC, MXFP8, W8A16, Request, Scheme, parse_scheme
from fp8pack.planning.spec import TensorSpec
from fp8pack.planning.storage import Storage

Packed = Sequence[tuple[TensorSpec, str]]

NAMES = {
    "vllm": "vLLM",
    "sglang": "SGLang",
    "tensorrt-llm": "TensorRT-LLM",
    "transformers": "transformers",
    "tgi": "TGI",
    "lmdeploy": "LMDeploy",
    "comfyui": "ComfyUI",
    "cublaslt": "load_packed() with cuBLASLt",
}
TP_SIZES = (1, 2, 4, 8)
LARGE_NBYTES = 16 * 10**9  # a model above this is served on several GPUs
GEMM_MULTIPLE = 16  # cuBLASLt and CUTLASS FP8 kernels want N and K in multiples of 16
WHOLE = ("transformers", "comfyui", "cublaslt")  # these load whole weights: no tensor parallelism to judge
LLM_ENGINES = ("vllm", "sglang", "tensorrt-llm", "transformers", "tgi", "lmdeploy")  # these ask for an architecture
NO_ARCHITECTURE = "no config.json names an architecture"

_FUSING = ("vllm", "sglang", "tensorrt-llm", "tgi", "lmdeploy")  # these build qkv_proj, gate_up_proj and run FP8 GEMMs
_EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True, slots=True)
class EngineVerdict:
    """Whether an engine loads the output: the tensor-parallel sizes that it loads at, or the reason and the remedy.

    If it loads at some sizes only, the reason is that of the first at which it does not.
    """

    engine: str
    tp: tuple[int, ...]
    note: str = ""
    reason: str = ""
    remedy: str = ""


class _Refusal(NamedTuple):
    reason: str
    remedy: str = ""


@dataclass(frozen=True)
class _Case:
    """What is judged: FP8 weights and how they are stored, the model, where it is to run, and what stays."""

    storage: Storage
    packed: Packed
    facts: ModelFacts
    sizes: tuple[int, ...]
    gpu: Gpu | None = None
    kept: tuple[str, ...] = ()

    @cached_property
    def kind(self) -> str:
        """How the rules call the storage."""
        return kind_of(self.storage)

    @cached_property
    def cuts(self) -> dict[int, str | None]:
        """Of each tensor-parallel size, why it is none."""
        return {tp: tp_problem(self.packed, self.storage.granularity, tp, self.facts) for tp in self.sizes}

    @cached_property
    def modules(self) -> dict[str, str]:
        """The modules that engines build of FP8 weights -> one of the checkpoint; an expert stands for its layer's."""
        one_expert = {_EXPERT.sub(".experts.*.", spec.name): spec.name for spec, _ in reversed(self.packed)}
        parts = {name.removesuffix(".weight"): fused_module(name) for name in one_expert.values()}
        return {module: module for module in parts} | {fused: module for module, fused in parts.items() if fused}

    @cached_property
    def groups(self) -> dict[str | None, str]:
        """What engines fuse -> a module of it that is FP8."""
        return {together(spec.name): spec.name.removesuffix(".weight") for spec, _ in reversed(self.packed)}


def parse_targets(texts: Sequence[str]) -> tuple[str, ...]:
    """Return engine names, in any case and with `_` for `-`."""
    targets = tuple(text.lower().replace("_", "-") for text in texts)
    targets = tuple("tensorrt-llm" if target == "trtllm" else target for target in targets)
    for text, target in zip(texts, targets, strict=True):
        if target not in NAMES:
            raise RecipeError(f"--target {text!r} is not known: choose {', '.join(NAMES)}")
    return targets


def judge_engines(
    storage: Storage,
    packed: Packed,
    facts: ModelFacts,
    *,
    tp: int | None = None,
    gpu: str | None = None,
    kept: Sequence[str] = (),
) -> tuple[EngineVerdict, ...]:
    """Return a verdict for every engine.

    packed: the FP8 weights [N, K] and their roles. tp, gpu: what it must load at, by default the usual sizes, any GPU.
    kept: the modules that stay, as the checkpoint lists them; empty if the list is not known.
    """
    case = _Case(storage, packed, facts, (tp,) if tp else TP_SIZES, parse_gpu(gpu), tuple(kept))
    return tuple(_judge(engine, case) for engine in NAMES)


def check_targets(verdicts: Sequence[EngineVerdict], storage: Storage, targets: Sequence[str]) -> None:
    """Raise RecipeError if an engine named by --target cannot load the output."""
    for verdict in verdicts:
        if verdict.engine in targets and not verdict.tp:
            remedy = f": use {verdict.remedy}" if verdict.remedy else ""
            raise RecipeError(
                f"{NAMES[verdict.engine]} cannot load {storage.granularity} scales in {storage.quant_method}: "
                f"{verdict.reason}{remedy}"
            )


def tp_problem(packed: Packed, granularity: Granularity, tp: int, facts: ModelFacts) -> str | None:
    """Return the first weight whose part on one of `tp` GPUs does not hold whole scale regions, in words.

    q/k/v, gate/up are cut along N, o and down along K; with fewer key heads than GPUs, k and v are replicated, and the
    first projections of latent attention always.
    """
    heads, kv_heads = facts.num_heads, facts.num_kv_heads
    if heads % tp or (kv_heads and kv_heads % tp and tp % kv_heads):
        return f"{heads} attention heads with {kv_heads} key heads do not spread over {tp} GPUs"
    if tp == 1:
        return None  # nothing is cut; what does not fit as it is, is no matter of parallelism
    rows = granularity.rows if granularity.rows and granularity.rows > 1 else GEMM_MULTIPLE
    cols = max(granularity.cols or GEMM_MULTIPLE, GEMM_MULTIPLE)
    for spec, role in packed:
        n, k = spec.shape
        parts = tp
        if role in ("attn.k", "attn.v") and kv_heads and facts.head_dim:
            parts = min(tp, kv_heads)
        if role.startswith("attn.o") or role.endswith(".down"):
            if k % tp or (k // tp) % cols:
                return f"{spec.name} has K = {k}, and {k} / {tp} is no multiple of {cols}"
        elif not (n % parts or (n // parts) % rows) or _leaf(spec) in REPLICATED:
            continue
        elif fused_module(spec.name) or role.startswith(("attn", "mlp", "expert")):
            return f"{spec.name} has N = {n}, and {n} / {parts} is no multiple of {rows}"
    return None


# One engine.


def _judge(engine: str, case: _Case) -> EngineVerdict:
    notes: list[str] = []
    for look in (_architecture, _reader, _weights, _shapes, _groups, _list, _head, _gpu):
        for found in look(engine, case):
            if isinstance(found, _Refusal):
                return EngineVerdict(engine, (), "", found.reason, found.remedy)
            notes.append(found)
    note = "; ".join(dict.fromkeys([*notes, *_kv_cache(engine, case)]))
    if engine in WHOLE:
        return EngineVerdict(engine, (1,), note)
    fitting = tuple(tp for tp, cut in case.cuts.items() if cut is None)
    for tp, cut in case.cuts.items():
        if cut:
            return EngineVerdict(engine, fitting, note, cut, _remedy_of_cut(engine, case, tp))
    return EngineVerdict(engine, fitting, note)


_Findings = Iterable[_Refusal | str]


def _architecture(engine: str, case: _Case) -> _Findings:
    if not case.facts.architecture and engine in LLM_ENGINES:
        yield _Refusal(NO_ARCHITECTURE)


def _reader(engine: str, case: _Case) -> _Findings:
    storage = case.storage
    if storage.format == E5M2 and engine != "comfyui" and (engine != "cublaslt" or storage.granularity == MX):
        who = "cuBLASLt takes no E5M2 with MX scales" if engine == "cublaslt" else "no LLM engine reads E5M2 weights"
        yield _Refusal(who, "--format e4m3")
    if storage.quant_method == "fp8pack" and engine != "cublaslt":
        yield _Refusal("only load_packed() reads quant_method fp8pack", "--scheme FP8_BLOCK or FP8_DYNAMIC")
    rule = next(iter(rules_for(READERS, engine, case.kind, case.facts.architecture)), None)
    if rule is None:
        activations = {"none": " with activations in BF16", "static": " with static activations"}
        which = f"{storage.granularity} scales{activations.get(storage.activations, '')}"
        remedy = "--scheme FP8_DYNAMIC --quant-method compressed-tensors"
        yield _Refusal(f"it has no reader for {which} in {storage.quant_method}", remedy)
    else:
        yield from _say(rule)


def _say(rule: Rule) -> _Findings:
    if not rule.loads:
        yield _Refusal(rule.text, rule.remedy)
    elif rule.text:
        yield rule.text


def _weights(engine: str, case: _Case) -> _Findings:
    first = {role: spec.name for spec, role in reversed(case.packed)}
    for role, name in first.items():
        for rule in rules_for(WEIGHTS, engine, case.kind, role):
            yield _Refusal(f"{name} is FP8, and it {rule.text}", rule.remedy)
    if any(role.startswith("expert") for role in first):
        for rule in rules_for(EXPERTS, engine, case.kind, case.facts.architecture)[:1]:
            if not rule.loads:
                yield _Refusal(f"it {rule.text}", rule.remedy)
    if case.facts.wrapper:
        for rule in rules_for(WRAPPERS, engine, case.kind, case.facts.architecture):
            yield _Refusal(f"it {rule.text}", rule.remedy)


def _shapes(engine: str, case: _Case) -> _Findings:
    granularity = case.storage.granularity
    if engine not in LLM_ENGINES:
        return
    for spec, _ in case.packed:
        n, k = spec.shape
        if granularity == MX and k % 32:
            yield _Refusal(f"{spec.name} has K = {k}, no multiple of 32", "--scheme FP8_DYNAMIC")
        if engine in _FUSING and (n % GEMM_MULTIPLE or k % GEMM_MULTIPLE):
            reason = f"{spec.name} is {n} x {k}, no multiple of {GEMM_MULTIPLE}, which no FP8 GEMM takes"
            yield _Refusal(reason, f"--ignore {spec.name.removesuffix('.weight')}")
        if granularity == BLOCK_128 and not granularity.fits(spec.shape) and not _takes_edge(engine, case, spec):
            reason = f"{spec.name} is {n} x {k}, no multiple of 128"
            yield _Refusal(reason, "" if engine == "lmdeploy" else "--scheme FP8_DYNAMIC")


def _takes_edge(engine: str, case: _Case, spec: TensorSpec) -> bool:
    """Say whether an engine reads a weight with partial blocks: at its edge in N, if it is a part of a fused one."""
    edges, _, _ = PARTIAL_BLOCKS[engine]
    if engine == "transformers" and case.storage.quant_method != "fp8":
        return True  # compressed-tensors cuts its blocks itself
    if edges == Edges.NONE:
        return False
    is_expert, leaf = _EXPERT.search(spec.name) is not None, _leaf(spec)
    if spec.shape[0] % 128 == 0 or not (is_expert or fused_module(spec.name)):
        return True
    return not is_expert and leaf in LAST_PARTS and (edges == Edges.LAST or leaf in REPLICATED)


def _leaf(spec: TensorSpec) -> str:
    return spec.name.removesuffix(".weight").rpartition(".")[2]


def _groups(engine: str, case: _Case) -> _Findings:
    """A fused module is FP8 in all of its parts, or in none."""
    if engine not in _FUSING or not case.kept:
        return
    for kept in case.kept:
        group = together(f"{kept}.weight")
        if group and (module := case.groups.get(group)):
            yield _Refusal(f"{module} is FP8 and {kept} is not, which it fuses into {group}", f"--ignore {module}")
    if engine == "vllm":
        yield from _missing_parts(case)


def _missing_parts(case: _Case) -> _Findings:
    """K and V may share their projection (Gemma 4): vLLM takes the v_proj that is not there for FP8."""
    kept = set(case.kept)
    if not all(is_understood(entry, ()) for entry in kept):
        return
    for module in case.kept:
        parent, _, leaf = module.rpartition(".")
        parts = {f"{parent}.{part}" for part in ("k_proj", "v_proj", "qkv_proj")}
        if leaf == "q_proj" and parts & kept == {f"{parent}.k_proj"}:
            reason = f"the list of modules that stay names {module} without {parent}.v_proj, which it takes for FP8"
            yield _Refusal(reason, "an entry for it in the list in config.json")


def _list(engine: str, case: _Case) -> _Findings:
    """No FP8 module is meant by the list of modules that stay; an entry that means nothing is worth a note."""
    syntax = list_syntax(engine, case.kind)
    if syntax is None or not case.kept:
        return
    if listed := find_listed(case.kept, tuple(case.modules), syntax.matches):
        entry, module = listed
        reason = f"{module} is FP8, and `{entry}` in the list of modules that stay means it"
        yield _Refusal(reason, f"--ignore {case.modules[module]}")
    if alien := next((entry for entry in case.kept if not is_understood(entry, syntax.matches)), None):
        yield f"`{alien}` in the list of modules that stay means nothing to it"
    if case.facts.tied and syntax.lists_tied_head and not find_listed(case.kept, ["lm_head"], syntax.matches):
        reason = "lm_head is tied to the embedding and not listed as staying, so it is taken for FP8"
        yield _Refusal(reason, "an entry for it in the list in config.json")


def _head(engine: str, case: _Case) -> _Findings:
    """Logits that are tied to the embedding have no weight of their own."""
    if not case.facts.tied or engine not in LLM_ENGINES:
        return
    if head := next((spec.name for spec, _ in case.packed if spec.name.endswith("lm_head.weight")), None):
        yield _Refusal(f"{head} is FP8, and config.json ties it to the embedding", "--ignore lm_head")


def _gpu(engine: str, case: _Case) -> _Findings:
    gpu = case.gpu
    rules = rules_for(ON_GPU, engine, case.kind, gpu.arch if gpu else "any")
    for rule in sorted(rules, key=lambda rule: rule.loads):
        yield from _say(rule)
    rounds = gpu is not None and gpu.wants_powers_of_two and engine in ROUNDS_ON_SM100
    if rounds and case.storage.granularity == BLOCK_128 and not case.storage.powers_of_two:
        yield "block scales are rounded up to powers of two at load; --scale-rounding up makes that exact"


def _kv_cache(engine: str, case: _Case) -> list[str]:
    if not case.storage.kv_cache:
        return []
    return [rule.text for rule in rules_for(KV_CACHE, engine, case.kind, case.facts.architecture)]


def _remedy_of_cut(engine: str, case: _Case, tp: int) -> str:
    """Channel scales survive more cuts, and expert parallelism does not cut experts: what is named does mend it."""
    remedies = []
    if engine != "lmdeploy" and tp_problem(case.packed, CHANNEL, tp, case.facts) is None:
        remedies.append("--scheme FP8_DYNAMIC")
    others = [(spec, role) for spec, role in case.packed if not role.startswith("expert")]
    if engine != "tgi" and tp_problem(others, case.storage.granularity, tp, case.facts) is None:
        remedies.append("serve with expert parallelism" if remedies else "expert parallelism")
    return ", or ".join(remedies)


# Which scheme.


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
    _scheme("comfyui", TENSOR),
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
    """A scheme held against the targets: the weights that it leaves in BF16, and why a target cannot load it."""

    scheme: Scheme
    num_kept: int
    refusals: dict[str, str]


def choose_scheme(request: Request, packed: Packed, facts: ModelFacts) -> tuple[Scheme, str]:
    """Return the scheme and the fact that decided it; block scales unless something speaks against them.

    Raises:
        RecipeError: no scheme serves all engines that --target names, or --gpu names none that is known.
    """
    named = parse_scheme(request.scheme)
    if named is not None:
        return named, "asked for"
    scheme, reason = _choose(request, packed, facts)
    gpu, granularity = parse_gpu(request.gpu), request.granularity or scheme.granularity
    if gpu and gpu.wants_powers_of_two and granularity == BLOCK_128 and request.scale_rounding is None:
        return replace(scheme, scale_rounding=ScaleRounding.UP), f"{reason}, in powers of two for {gpu.name}"
    return scheme, reason


def _choose(request: Request, packed: Packed, facts: ModelFacts) -> tuple[Scheme, str]:
    static = request.activations == "static" or (request.calibration is not None and not request.kv_cache)
    activations = request.activations or ("static" if static else "dynamic")
    overridden = [_overridden(choice, request) for choice in _CHOICES if choice.activations == activations]
    choices = [choice for choice in overridden if choice is not None]
    if request.targets and choices:
        return _choose_for_targets(choices, request, packed, facts)
    if static:
        return FP8, "auto: the calibration gives static activation scales"
    if ragged := _ragged(packed):
        return FP8_DYNAMIC, f"auto: {ragged}"
    for tp in _sizes(request, packed):
        if problem := tp_problem(packed, BLOCK_128, tp, facts):
            return FP8_DYNAMIC, f"auto: {problem}"
    for engine, loaders in RENAMING.items():
        if facts.architecture in loaders and (not request.targets or engine in request.targets):
            return FP8_DYNAMIC, f"auto: {NAMES[engine]}'s {loaders[facts.architecture]} loader loses block scales"
    return FP8_BLOCK, "auto: every packed dimension is a multiple of 128"


def _overridden(choice: Scheme, request: Request) -> Scheme | None:
    """Return a choice with the format and rounding that are asked for; None if it is not what is asked for."""
    method = (request.quant_method or choice.quant_method).lower().replace("_", "-")
    if method != choice.quant_method or request.granularity not in (None, choice.granularity):
        return None
    if request.format == E5M2 and choice.quant_method != "comfyui":
        return None
    rounding = request.scale_rounding or choice.scale_rounding
    return replace(choice, format=request.format or choice.format, scale_rounding=rounding)


def _ragged(packed: Packed) -> str | None:
    spec = next((spec for spec, _ in packed if not BLOCK_128.fits(spec.shape)), None)
    return f"{spec.name} is {spec.shape[0]} x {spec.shape[1]}, no multiple of 128" if spec else None


def _sizes(request: Request, packed: Packed) -> tuple[int, ...]:
    if request.tp:
        return (request.tp,)
    return TP_SIZES[1:] if sum(spec.nbytes for spec, _ in packed) > LARGE_NBYTES else ()


def _choose_for_targets(
    choices: Sequence[Scheme], request: Request, packed: Packed, facts: ModelFacts
) -> tuple[Scheme, str]:
    """Return the first of the choices that every target loads and that leave the fewest weights in BF16."""
    sizes = _sizes(request, packed)
    if not request.tp:  # where heads do not spread, no scheme would help
        sizes = tuple(tp for tp in sizes if tp_problem((), TENSOR, tp, facts) is None)
    trials: list[_Trial] = []
    for choice in choices:
        trials.append(_try(choice, request, packed, facts, sizes or (1,)))
        if not trials[-1].refusals and not trials[-1].num_kept:
            break  # none can be better
    serving = [trial for trial in trials if not trial.refusals]
    if not serving:
        raise RecipeError(_conflict(trials, request.targets))
    best = min(serving, key=lambda trial: trial.num_kept)
    return best.scheme, f"auto: {_reason(best, trials[0], packed, request.targets)}"


def _reason(best: _Trial, first: _Trial, packed: Packed, targets: Sequence[str]) -> str:
    names = ", ".join(NAMES[target] for target in targets)
    if best is not first:
        refused = next((f"{NAMES[target]}: {reason}" for target, reason in first.refusals.items()), None)
        return refused or _ragged(packed) or f"what {names} can load"
    if best.num_kept:
        return f"{best.num_kept} weights stay that do not fit the {best.scheme.granularity} of {names}"
    if best.scheme.granularity == BLOCK_128:
        return "every packed dimension is a multiple of 128"
    return f"what {names} can load"


def _try(choice: Scheme, request: Request, packed: Packed, facts: ModelFacts, sizes: tuple[int, ...]) -> _Trial:
    held = _held(choice.granularity, packed)
    spelled = choice.quant_method == "fp8" and choice.granularity == TENSOR and "transformers" in request.targets
    storage = Storage(
        choice.quant_method,
        choice.format,
        choice.granularity,
        choice.activations,
        powers_of_two=choice.scale_rounding != ScaleRounding.NONE,
        spelling="transformers" if spelled else "",
    )
    case = _Case(storage, held, facts, sizes, parse_gpu(request.gpu))
    verdicts = [_judge(target, case) for target in request.targets]
    refusals = {verdict.engine: verdict.reason for verdict in verdicts if not verdict.tp or verdict.reason}
    if packed and not held:
        refusals = dict.fromkeys(request.targets, f"no weight fits {choice.granularity} scales")
    return _Trial(choice, len(packed) - len(held), refusals)


def _held(granularity: Granularity, packed: Packed) -> Packed:
    """Return the weights that hold whole regions, without those that engines fuse with one that does not."""
    whole = granularity in (BLOCK_128, MX)

    def fits(spec: TensorSpec) -> bool:
        n, k = spec.shape
        return n % GEMM_MULTIPLE == 0 and k % GEMM_MULTIPLE == 0 and (not whole or granularity.fits(spec.shape))

    broken = {together(spec.name) or spec.name for spec, _ in packed if not fits(spec)}
    return [(spec, role) for spec, role in packed if (together(spec.name) or spec.name) not in broken]


def _conflict(trials: Sequence[_Trial], targets: Sequence[str]) -> str:
    """Return which target nothing serves, or which two exclude each other, in words."""
    loaded = {target: [trial for trial in trials if target not in trial.refusals] for target in targets}
    for target in targets:
        if not loaded[target]:
            return f"{NAMES[target]} loads no scheme of this model: {trials[0].refusals[target]}"
    for one, other in combinations(targets, 2):
        if not any(trial in loaded[other] for trial in loaded[one]):
            of_one, of_other = loaded[other][0].refusals[one], loaded[one][0].refusals[other]
            return f"no scheme serves both {NAMES[one]} ({of_one}) and {NAMES[other]} ({of_other}): pack twice"
    return f"no scheme serves {', '.join(NAMES[target] for target in targets)} at once: pack twice"
