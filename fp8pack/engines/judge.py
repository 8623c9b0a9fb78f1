"""Whether an inference engine loads a checkpoint, decided offline by rules for each engine.

The rules were read in the engines' code; docs/engines.md says which were run, and docs/vllm.md what vLLM did.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from fp8pack.engines.case import EXPERT, Case
from fp8pack.engines.class_facts import read_class_facts
from fp8pack.engines.engine import KEEP_EXPERTS, Edges, Engine, EngineRule, matches_kind, rules_for
from fp8pack.engines.ignore_list import find_listed, is_understood
from fp8pack.engines.known import BY_ID, ENGINES, NAMES, find_engine, id_of
from fp8pack.engines.module_facts import ModuleFacts, find_modules, is_kept, read_module_facts
from fp8pack.errors import RecipeError
from fp8pack.modelfacts.fused import LAST_PARTS, REPLICATED, fused_module, together
from fp8pack.modelfacts.model import ModelFacts
from fp8pack.modelfacts.patterns import star
from fp8pack.modelfacts.spec import TensorSpec
from fp8pack.modelfacts.storage import Storage
from fp8pack.modelfacts.tensor_parallel import GEMM_MULTIPLE, tp_problem
from fp8pack.numerics.formats import E4M3, E5M2
from fp8pack.numerics.granularity import BLOCK_128, CHANNEL, MX, TENSOR

_DECLARE = "fp8pack convert"
_NOT_STRICT = "leave out --strict-target"
NO_ARCHITECTURE = "no config.json names an architecture"

# What a remedy may change: the quant method, or the preset. tests/engines/test_remedies.py applies each.
METHODS = ("compressed-tensors", "fp8", "modelopt", "mxfp8", "quark", "torchao", "comfyui")
PRESETS = {
    "FP8_DYNAMIC": Storage("compressed-tensors", E4M3, CHANNEL, "dynamic"),
    "FP8_BLOCK": Storage("fp8", E4M3, BLOCK_128, "dynamic"),
    "MXFP8": Storage("compressed-tensors", E4M3, MX, "dynamic", powers_of_two=True),
    "W8A16": Storage("compressed-tensors", E4M3, CHANNEL, "none"),
    "FP8_SCALED": Storage("comfyui", E4M3, TENSOR, "dynamic"),
}


@dataclass(frozen=True, slots=True)
class EngineVerdict:
    """Whether an engine loads the output: the tensor-parallel sizes at which it does, or the reason and the remedy.

    loads: None if that is not known; the reason says why. version: of the engine, as its code was read. If it loads at
    some sizes only, the reason is of the first size at which it does not.
    """

    engine: str
    loads: bool | None
    tp: tuple[int, ...]
    note: str = ""
    reason: str = ""
    remedy: str = ""
    version: str = ""


class _Refusal(NamedTuple):
    reason: str
    remedy: str = ""


class _Unknown(NamedTuple):
    reason: str


def judge_engines(case: Case, targets: Sequence[str] = ()) -> tuple[EngineVerdict, ...]:
    """Return a verdict for every engine; targets may name versions of some, the newest that was read is the default."""
    named = {id_of(target): find_engine(target) for target in targets}
    engines = [named.get(engine.id, engine) for engine in ENGINES]
    verdicts = [replace(judge_engine(engine, case), version=engine.version) for engine in engines]
    return tuple(
        replace(verdict, remedy=_remedy(engine, case)) if verdict.loads is False and not verdict.remedy else verdict
        for engine, verdict in zip(engines, verdicts, strict=True)
    )


def module_facts(facts: ModelFacts) -> ModuleFacts:
    """Return how transformers builds the modules of a model; of a class that was not read, as they are in the files."""
    name = BY_ID["transformers"].modules
    return read_module_facts(name, facts.architecture, facts.model_type) or ModuleFacts()


def tied_heads(facts: ModelFacts) -> tuple[str, ...]:
    """Return the linears that transformers ties to an embedding, so that the files may not have them."""
    known = read_class_facts(BY_ID["transformers"].facts)
    built = known.classes.get(facts.architecture) if known else None
    return built.tied if built else ("lm_head",) if facts.tied else ()


def check_targets(
    verdicts: Sequence[EngineVerdict], storage: Storage, targets: Sequence[str], *, strict: bool = False
) -> None:
    """Raise RecipeError if an engine that is a target cannot load the output; strict: or if that is not known."""
    ids = {id_of(target) for target in targets}
    for verdict in verdicts:
        if verdict.engine in ids and (verdict.loads is False or (strict and verdict.loads is None)):
            stored = f"{storage.granularity} scales in {storage.quant_method}"
            loads, remedy = ("cannot", verdict.remedy) if verdict.loads is False else ("may not", _NOT_STRICT)
            raise RecipeError(
                f"{verdict.version or NAMES[verdict.engine]} {loads} load {stored}: {verdict.reason}", remedy
            )


def judge_engine(engine: Engine, case: Case) -> EngineVerdict:
    """Return the verdict of one engine; without a remedy that changes the recipe, which costs more trials."""
    notes: list[str] = []
    unknown: _Unknown | None = None
    for look in (_architecture, _names, _reader, _weights, _built, _modules, _shapes, _groups, _list, _head, _gpu):
        for found in look(engine, case):
            if isinstance(found, _Refusal):
                return EngineVerdict(engine.id, False, (), "", found.reason, found.remedy)
            if isinstance(found, _Unknown):
                unknown = unknown or found
            else:
                notes.append(found)
    if unknown is not None:
        return EngineVerdict(engine.id, None, (), "", unknown.reason)
    note = "; ".join(dict.fromkeys([*notes, *_kv_cache(engine, case)]))
    if engine.loads_whole:
        return EngineVerdict(engine.id, True, (1,), note)
    if parts := _parts(engine, case):
        whole = case.storage.granularity.rows == 1 and 1 in case.sizes
        note = "; ".join(filter(None, [note, f"TP 1 only: {parts}"]))
        return EngineVerdict(engine.id, True, (1,), note) if whole else EngineVerdict(engine.id, None, (), "", parts)
    cuts = {tp: cut or _cut_of_experts(engine, case, tp) for tp, cut in case.cuts.items()}
    fitting = tuple(tp for tp, cut in cuts.items() if not cut)
    tp, cut = next(((tp, cut) for tp, cut in cuts.items() if cut), (1, ""))
    remedy = _remedy_of_cut(engine, case, tp) if case.cuts.get(tp) else ""
    return EngineVerdict(engine.id, bool(fitting), fitting, note, cut, remedy)


def _cut_of_experts(engine: Engine, case: Case, tp: int) -> str:
    """Why an engine cannot divide experts into these groups at this tensor-parallel size, empty if it can.

    Sources: vllm/model_executor/layers/fused_moe/config.py (among all GPUs), determine_expert_map (with a rest);
    sglang/srt/layers/moe/fused_moe_triton/layer.py (asserts that there is no rest).
    """
    count = case.weights.num_experts
    if case.ep == 1 or not count:
        return ""
    if engine.id == "vllm" and tp != case.ep:
        return f"it divides experts among all {tp} GPUs, not into {case.ep} groups"
    if engine.id == "sglang" and count % case.ep:
        return f"{count} experts do not divide evenly among {case.ep} groups of GPUs"
    return ""


def _remedy(engine: Engine, case: Case) -> str:
    """The option with which the engine loads it: the same scales under another quant method, or a preset."""
    stored = case.storage
    methods = () if stored.granularity.name.startswith("group:") else METHODS  # few can store groups
    ways = {f"--quant-method {name}": replace(stored, quant_method=name, spelling="") for name in methods}
    presets = sorted(PRESETS.items(), key=lambda preset: preset[1].granularity != stored.granularity)
    ways |= {f"--scheme {name}": storage for name, storage in presets}
    for option, storage in ways.items():
        if judge_engine(engine, replace(case, storage=storage, sizes=case.sizes[:1])).loads is not False:
            return option
    return ""


_Findings = Iterable[_Refusal | _Unknown | str]


def _architecture(engine: Engine, case: Case) -> _Findings:
    name, known = case.facts.architecture, read_class_facts(engine.facts)
    if not name and engine.is_for_language_models:
        yield _Refusal(NO_ARCHITECTURE)
    if known is None or name in known.classes or case.facts.model_type in known.model_types:
        return
    if last := known.removed.get(name):
        yield _Refusal(f"it had {name} until {last}")
    elif known.falls_back:
        count = len(known.classes) or len(known.model_types)
        other = "or be code of its own" if engine.id == "transformers" else "or run through transformers"
        yield _Unknown(f"{name} is not among its {count} classes; it may have another name, {other}")
    else:
        yield _Refusal(f"{name} is not among its {len(known.classes)} classes")


def _built(engine: Engine, case: Case) -> _Findings:
    """The class of the engine builds each FP8 weight with the quantization config."""
    built, of_leaf = case.built_by(engine), case.weights.leaves
    if built is None:
        return
    if "*" in built.unknown:
        yield _Unknown(f"its class of {case.facts.architecture} was not found in its code")
    leaves = [
        leaf
        for leaf in of_leaf
        if not any(matches_kind(kinds, case.kind) for kinds in engine.dequantizes.get(leaf, ()))
    ]
    if wide := [leaf for leaf in leaves if built.find(leaf, built.unquantized)]:
        name = built.find(wide[0], built.unquantized)
        remedy = " ".join(f"--ignore '*.{leaf}'" for leaf in wide)
        yield _Refusal(f"{of_leaf[wide[0]]} is FP8, and its class builds {name} in BF16", remedy)
    for leaf in leaves:
        if built.find(leaf, built.unknown):
            yield _Unknown(f"parsing does not tell whether its class builds {of_leaf[leaf]} in BF16")


def _modules(engine: Engine, case: Case) -> _Findings:
    """Each FP8 weight becomes one FP8 linear, or a part of the experts that the class puts together."""
    built = read_module_facts(engine.modules, case.facts.architecture, case.facts.model_type)
    if built is None:
        return
    if case.storage.quant_method.replace("mxfp8", "fp8") in built.refused:
        yield _Refusal(f"it does not build this class with {case.storage.quant_method} scales")
    paths = {stem: find_modules(stem, built.names)[0] for stem in case.weights.stems}
    replaces = case.storage.quant_method in ("fp8", "mxfp8")
    if found := [stem for stem in paths if stem in built.converted or (stem in built.joined and not replaces)]:
        remedy = " ".join(f"--ignore '*.{leaf}'" for leaf in dict.fromkeys(stem.rpartition(".")[2] for stem in found))
        name = case.weights.stems[found[0]]
        yield _Refusal(f"{name} is FP8, and it splits or joins that at load, but not the scales", remedy)
    merges = any(rule.loads for rule in rules_for(engine.experts, case.kind, case.facts.architecture))
    if not merges and any(path in built.experts and stem not in built.merged for stem, path in paths.items()):
        yield _Refusal("it has no conversion from experts one by one for this class", KEEP_EXPERTS)
    if found := [stem for stem, path in paths.items() if path in built.others]:
        leaf, name = found[0].rpartition(".")[2], case.weights.stems[found[0]]
        yield _Refusal(f"{name} is FP8, and its class has no linear there", f"--ignore '*.{leaf}'")
    if replaces:
        yield from _replaced(built, paths, case)


def _replaced(built: ModuleFacts, paths: Mapping[str, str], case: Case) -> _Findings:
    """Of FP8 files with blocks, transformers replaces plain linears, and experts, by classes of its own."""
    if built.has_scale:
        yield _Refusal("it takes parameters of this class that are called scale for scales of weights")
    if missed := next((name for name in case.ignored if star(name) in built.missed), None):
        yield _Refusal(f"it does not find {missed} in the list of ignored modules")
    for stem, path in paths.items():
        name = case.weights.stems[stem]
        if path in built.unfit or any(path.startswith(f"{experts}.") for experts in built.unfit):
            yield _Refusal("its class of FP8 experts does not fit the experts of this class")
        elif path in built.subclasses:
            yield _Refusal(f"{name} is FP8, and its class has a linear of its own there, which it does not replace")
        elif is_kept(path, built.wide):
            yield _Refusal(f"{name} is FP8, and its class keeps it in float32")


def _names(engine: Engine, case: Case) -> _Findings:
    """Engines look for the names of the model itself; load_packed() takes any."""
    prefix, name = case.weights.wrapped
    if prefix and engine.is_for_language_models and engine.facts:
        yield _Refusal(f"tensor names have {prefix}, as {name}", f"--strip-prefix {prefix}")


def _reader(engine: Engine, case: Case) -> _Findings:
    storage = case.storage
    if storage.format == E5M2 and engine.id != "comfyui" and (engine.id != "cublaslt" or storage.granularity == MX):
        who = "cuBLASLt takes no E5M2 with MX scales" if engine.id == "cublaslt" else "no LLM engine reads E5M2 weights"
        yield _Refusal(who)
    if storage.quant_method == "fp8pack" and engine.id != "cublaslt":
        yield _Refusal("only load_packed() reads quant_method fp8pack")
    if not storage.quant_method and engine.is_for_language_models:
        yield _Refusal("config.json has no quantization_config, which says how the scales are meant", _DECLARE)
    rule = next(iter(rules_for(engine.readers, case.kind, case.facts.architecture)), None)
    if rule is None:
        activations = {"none": " with activations in BF16", "static": " with static activations"}
        which = f"{storage.granularity} scales{activations.get(storage.activations, '')}"
        yield _Refusal(f"it has no reader for {which} in {storage.quant_method}")
    else:
        yield from _say(rule)


def _say(rule: EngineRule) -> _Findings:
    if not rule.loads:
        yield _Refusal(rule.text, rule.remedy)
    elif rule.text:
        yield rule.text


def _weights(engine: Engine, case: Case) -> _Findings:
    first = {role: spec.name for spec, role in reversed(case.packed)}
    for role, name in first.items():
        for rule in rules_for(engine.weights, case.kind, role):
            yield _Refusal(f"{name} is FP8, and it {rule.text}", rule.remedy)
    if any(role.startswith("expert") for role in first):
        for rule in rules_for(engine.experts, case.kind, case.facts.architecture)[:1]:
            if not rule.loads:
                yield _Refusal(f"it {rule.text}", rule.remedy)
    if case.facts.wrapper:
        for rule in rules_for(engine.wrappers, case.kind, case.facts.architecture):
            yield _Refusal(f"it {rule.text}", rule.remedy)


def _shapes(engine: Engine, case: Case) -> _Findings:
    granularity = case.storage.granularity
    if not engine.is_for_language_models:
        return
    for spec, _ in case.packed:
        n, k = spec.shape
        if granularity == MX and k % 32:
            yield _Refusal(f"{spec.name} has K = {k}, not a multiple of 32")
        if engine.fuses and (n % GEMM_MULTIPLE or k % GEMM_MULTIPLE):
            reason = f"{spec.name} is {n} x {k}, not a multiple of {GEMM_MULTIPLE}, which no FP8 GEMM takes"
            yield _Refusal(reason, f"--ignore {spec.name.removesuffix('.weight')}")
        if granularity == BLOCK_128 and not granularity.fits(spec.shape) and not _takes_edge(engine, case, spec):
            yield _Refusal(f"{spec.name} is {n} x {k}, not a multiple of 128")


def _takes_edge(engine: Engine, case: Case, spec: TensorSpec) -> bool:
    """Say whether an engine reads the partial blocks of a weight; of a part of a fused one, those in N."""
    edges = engine.partial_blocks.edges if engine.partial_blocks else Edges.NONE
    if engine.id == "transformers" and case.storage.quant_method != "fp8":
        return True  # compressed-tensors cuts its blocks itself
    if edges == Edges.NONE:
        return False
    is_expert, leaf = EXPERT.search(spec.name) is not None, _leaf(spec)
    if spec.shape[0] % 128 == 0 or not (is_expert or fused_module(spec.name)):
        return True
    return not is_expert and leaf in LAST_PARTS and (edges == Edges.LAST or leaf in REPLICATED)


def _leaf(spec: TensorSpec) -> str:
    return spec.name.removesuffix(".weight").rpartition(".")[2]


def _groups(engine: Engine, case: Case) -> _Findings:
    """All parts of a fused module are FP8, or none."""
    if not engine.fuses or not case.ignored:
        return
    for ignored in case.ignored:
        group = together(f"{ignored}.weight")
        if group and (module := case.weights.groups.get(group)):
            reason = f"{module} is FP8 and {ignored} is not, but it fuses both into {group}"
            yield _Refusal(reason, f"--ignore {module}")
    if engine.id == "vllm":
        yield from _missing_parts(case)


def _missing_parts(case: Case) -> _Findings:
    """K and V may share their projection (Gemma 4): vLLM would load the missing v_proj as FP8."""
    ignored = set(case.ignored)
    if not all(is_understood(entry, ()) for entry in ignored):
        return
    for module in case.ignored:
        parent, _, leaf = module.rpartition(".")
        parts = {f"{parent}.{part}" for part in ("k_proj", "v_proj", "qkv_proj")}
        if leaf == "q_proj" and parts & ignored == {f"{parent}.k_proj"}:
            reason = f"config.json ignores {module} but not {parent}.v_proj, which it would load as FP8"
            yield _Refusal(reason, f"add {parent}.v_proj to the ignored modules in config.json")


def _list(engine: Engine, case: Case) -> _Findings:
    """No ignore entry matches an FP8 module; an entry that is no pattern of this engine gets a note."""
    syntax = engine.list_syntax(case.kind)
    if syntax is None or not case.ignored:
        return
    if listed := find_listed(case.ignored, tuple(case.weights.modules), syntax.matches):
        entry, module = listed
        reason = f"ignore entry `{entry}` also matches {module}, which is FP8"
        yield _Refusal(reason, f"--ignore {case.weights.modules[module]}")
    fused = {ignored: fused_module(f"{ignored}.weight") for ignored in case.ignored if not syntax.knows_parts}
    if part := next((part for part, whole in fused.items() if whole and whole not in case.ignored), None):
        yield _Refusal(f"it does not know that {fused[part]} is ignored where its parts are, as {part}")
    if alien := next((entry for entry in case.ignored if not is_understood(entry, syntax.matches)), None):
        yield f"ignore entry `{alien}` is no valid pattern for it"
    for head in tied_heads(case.facts) if case.facts.tied and syntax.lists_tied_head else ():
        if not find_listed(case.ignored, [head], syntax.matches):
            reason = f"{head} is tied to the embedding and not ignored, so it would be loaded as FP8"
            yield _Refusal(reason, f"add {head} to the ignored modules in config.json")


def _head(engine: Engine, case: Case) -> _Findings:
    """Logits that are tied to the embedding have no weight of their own."""
    if not case.facts.tied or not engine.is_for_language_models:
        return
    if head := next((spec.name for spec, _ in case.packed if spec.name.endswith("lm_head.weight")), None):
        yield _Refusal(f"{head} is FP8, and config.json ties it to the embedding", "--ignore lm_head")


def _gpu(engine: Engine, case: Case) -> _Findings:
    gpu = case.gpu
    rules = rules_for(engine.on_gpu, case.kind, gpu.arch if gpu else "any")
    for rule in sorted(rules, key=lambda rule: rule.loads):
        yield from _say(rule)
    rounds = gpu is not None and gpu.wants_powers_of_two and bool(engine.rounds_on_sm100)
    if rounds and case.storage.granularity == BLOCK_128 and not case.storage.powers_of_two:
        yield "block scales are rounded up to powers of two at load; --scale-rounding up makes that exact"


def _parts(engine: Engine, case: Case) -> str:
    """Say which weight the class cuts into more parts than gate and up: shards and blocks end where those do."""
    built = case.built_by(engine)
    for leaf, module in case.weights.leaves.items():
        if built is not None and (count := built.merged.get(leaf, 1)) > len(("gate", "up")):
            return f"its class has {module} in {count} parts, whose sizes were not read"
    return ""


def _kv_cache(engine: Engine, case: Case) -> list[str]:
    if not case.storage.kv_cache:
        return []
    built = case.built_by(engine)
    if built is not None and built.kv_scales is False:
        return ["its class drops the scales of K and V, which become 1.0"]
    return [rule.text for rule in rules_for(engine.kv_cache, case.kind, case.facts.architecture)]


def _remedy_of_cut(engine: Engine, case: Case, tp: int) -> str:
    """Channel scales allow more sizes, and expert parallelism does not shard experts; each remedy was checked."""
    remedies = []
    if engine.id != "lmdeploy" and tp_problem(case.packed, CHANNEL, tp, case.facts) is None:
        remedies.append("--scheme FP8_DYNAMIC")
    others = [(spec, role) for spec, role in case.packed if not role.startswith("expert")]
    if engine.id != "tgi" and tp_problem(others, case.storage.granularity, tp, case.facts) is None:
        remedies.append("serve with expert parallelism" if remedies else "expert parallelism")
    return ", or ".join(remedies)
