"""The rules of an inference engine, as one value; every rule names its source."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from fnmatch import fnmatchcase

from fp8pack.engines.ignore_list import ListSyntax
from fp8pack.modelfacts.storage import Storage


class Evidence(StrEnum):
    """How a rule was found."""

    RUN = "run in tests/interop or tests/in_vllm"
    READ = "engine's code as read"
    INFERRED = "inferred from the engine's code"
    REPORTED = "reported in the issue"


READ, INFERRED, RUN, REPORTED = Evidence.READ, Evidence.INFERRED, Evidence.RUN, Evidence.REPORTED

# Shared by several engines.
KEEP_EXPERTS = "--ignore '*experts*'"
ONE_BY_ONE = "was not read to take experts of this class one by one"
FNUZ = "turned into e4m3fnuz at load"


@dataclass(frozen=True, slots=True)
class EngineRule:
    """What an engine does with some kinds of storage.

    kinds: globs over `method granularity activations`, separated by commas; the naming follows the method, as in
    `fp8/transformers tensor dynamic`. loads: whether it loads them; `text` is then a note, else the reason. remedy:
    only if it is not another recipe, which is found by trying. only: globs over the subject of the rule:
    architectures, roles of weights, or GPUs (`any` if none is named).
    """

    kinds: str
    loads: bool
    source: str
    text: str = ""
    remedy: str = ""
    evidence: Evidence = Evidence.READ
    only: tuple[str, ...] = ("*",)

    def covers(self, kind: str, subject: str) -> bool:
        """Say whether the rule applies to this kind of storage and this architecture, role or GPU."""
        return matches_kind(self.kinds, kind) and any(fnmatchcase(subject, glob) for glob in self.only)


class Edges(StrEnum):
    """Which partial blocks an engine supports, at the edge of a weight whose N or K is not a multiple of 128."""

    LAST = "of a single weight, and of the last part of a fused one"
    SINGLE = "of a single weight"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class PartialBlocks:
    """Which partial blocks an engine supports, and where that was read."""

    edges: Edges
    source: str
    evidence: Evidence = Evidence.READ


@dataclass(frozen=True, slots=True)
class Engine:
    """An inference engine at the version that was read.

    readers: what it reads; the first rule that covers a storage and the architecture decides. weights: roles that it
    does not load in FP8. experts: of classes that store the experts of a layer in one tensor. wrappers: of models with
    a text_config. on_gpu: rules for a GPU; a refusal comes first, all others become notes. kv_cache: how it uses scales
    of K and V. lists: how it matches ignore entries. renaming: classes that rename `weight_scale_inv` -> their names.
    rounds_on_sm100: where it was read to round block scales to powers of two on SM100, which DeepGEMM needs there.
    fuses: it builds qkv_proj and gate_up_proj. loads_whole: it has no tensor parallelism to judge.
    is_for_language_models: it needs an architecture in config.json. facts, modules: the files in data/ of its classes,
    and of their modules.
    earlier: versions before this one whose classes were read -> the weights that each of them does not load beside.
    dequantizes: linears that it makes BF16 at load -> the kinds of storage from which it can.
    """

    id: str
    name: str
    version: str
    readers: tuple[EngineRule, ...]
    weights: tuple[EngineRule, ...] = ()
    experts: tuple[EngineRule, ...] = ()
    wrappers: tuple[EngineRule, ...] = ()
    on_gpu: tuple[EngineRule, ...] = ()
    kv_cache: tuple[EngineRule, ...] = ()
    lists: tuple[ListSyntax, ...] = ()
    renaming: Mapping[str, str] = field(default_factory=dict)
    partial_blocks: PartialBlocks | None = None
    rounds_on_sm100: str = ""
    fuses: bool = False
    loads_whole: bool = False
    is_for_language_models: bool = True
    facts: str = ""
    modules: str = ""
    earlier: Mapping[str, tuple[EngineRule, ...]] = field(default_factory=dict)
    dequantizes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def at(self, version: str) -> "Engine":
        """Return the engine with the classes of a version, and with what the newest loads and it does not."""
        if not version:
            return self
        weights = (*self.earlier[version], *self.weights)
        return replace(self, version=f"{self.name} {version}", facts=f"{self.id}-{version}", weights=weights)

    def list_syntax(self, kind: str) -> ListSyntax | None:
        """Return how the engine matches ignore entries, None if that was not read."""
        return next((row for row in self.lists if matches_kind(row.kinds, kind)), None)


def matches_kind(kinds: str, kind: str) -> bool:
    """Say whether one of several globs, separated by commas, matches a kind of storage."""
    return any(fnmatchcase(kind, glob) for glob in kinds.split(", "))


def kind_of(storage: Storage) -> str:
    """Return the storage as the rules name it: `compressed-tensors channel dynamic`."""
    method = f"{storage.quant_method}/{storage.spelling}" if storage.spelling else storage.quant_method
    return f"{method} {storage.granularity.name} {storage.activations}"


def rules_for(rules: Sequence[EngineRule], kind: str, subject: str = "") -> list[EngineRule]:
    """Return the rules that apply to a kind of storage and an architecture, role or GPU."""
    return [rule for rule in rules if rule.covers(kind, subject)]


def renaming_rules(classes: Mapping[str, str], source: str, *, loses_mx: bool = False) -> tuple[EngineRule, ...]:
    """Return the rules of classes that rename `weight_scale_inv`: architecture -> the name of the engine's loader."""
    lost = [("block scales", "fp8 block:*, auto-round block:*")]
    lost += [("MX scales", "mxfp8 mx *, modelopt mx *")] if loses_mx else []
    rules = []
    for architecture, loader in classes.items():
        for what, kinds in lost:
            text = f"its {loader} loader loses {what}"
            rules.append(EngineRule(kinds, False, source, text, evidence=INFERRED, only=(architecture,)))
        rules.append(EngineRule("fp8/transformers tensor *", True, source, only=(architecture,)))
    return tuple(rules)
