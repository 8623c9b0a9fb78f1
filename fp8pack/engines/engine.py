"""What is known of an inference engine, as one value; every rule says where it was read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from fnmatch import fnmatchcase

from fp8pack.engines.ignore_list import ListSyntax
from fp8pack.modelfacts.storage import Storage


class Evidence(StrEnum):
    """How a rule is known."""

    RUN = "library run in tests/interop"
    READ = "engine's code as read"
    INFERRED = "inferred from the engine's code"
    REPORTED = "reported in the issue"


READ, INFERRED, RUN, REPORTED = Evidence.READ, Evidence.INFERRED, Evidence.RUN, Evidence.REPORTED

# What several engines say.
DYNAMIC, BLOCK, COMPRESSED_TENSORS = (
    "--scheme FP8_DYNAMIC",
    "--scheme FP8_BLOCK",
    "--quant-method compressed-tensors",
)
KEEP_EXPERTS = "--ignore '*experts*'"
ONE_BY_ONE = "was not read to take experts of this class one by one"
FNUZ = "turned into e4m3fnuz at load"


@dataclass(frozen=True, slots=True)
class EngineRule:
    """What an engine does with some kinds of storage.

    kinds: globs over `method granularity activations`, separated by commas; a spelling follows the method, as in
    `fp8/transformers tensor dynamic`. loads: whether it goes on; then `text` is what must be known besides, else the
    reason. only: globs over what the rule is about: architectures, roles of weights, or GPUs (`any` if none is named).
    """

    kinds: str
    loads: bool
    source: str
    text: str = ""
    remedy: str = ""
    evidence: Evidence = Evidence.READ
    only: tuple[str, ...] = ("*",)

    def covers(self, kind: str, subject: str) -> bool:
        """Say whether the rule speaks of this kind of storage and this architecture, role or GPU."""
        return matches_kind(self.kinds, kind) and any(fnmatchcase(subject, glob) for glob in self.only)


class Edges(StrEnum):
    """Which partial blocks an engine takes, at the edge of a weight whose N or K is no multiple of 128."""

    LAST = "of a single weight, and of the last part of a fused one"
    SINGLE = "of a single weight"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class PartialBlocks:
    """Which partial blocks an engine takes, and where that was read."""

    edges: Edges
    source: str
    evidence: Evidence = Evidence.READ


@dataclass(frozen=True, slots=True)
class Engine:
    """An inference engine at the version that was read.

    readers: what it reads; the first rule that covers a storage and the architecture decides. weights: FP8 weights of a
    role that it does not take. experts: of classes that hold the experts of a layer in one tensor. wrappers: of models
    with a text_config. on_gpu: what a GPU changes; a refusal counts first, all others are noted. kv_cache: what becomes
    of scales of K and V. lists: how it compares the entries of the list of ignored modules. renaming: classes that
    rename `weight_scale_inv`, and what they are called. rounds_on_sm100: where it was read to turn block scales into
    powers of two on SM100, whose DeepGEMM takes no others. fuses: it builds qkv_proj and gate_up_proj. loads_whole: it
    has no tensor parallelism to judge. is_for_language_models: it asks config.json for an architecture.
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

    def list_syntax(self, kind: str) -> ListSyntax | None:
        """Return how the engine compares the list of ignored modules, None where that was not read."""
        return next((row for row in self.lists if matches_kind(row.kinds, kind)), None)


def matches_kind(kinds: str, kind: str) -> bool:
    """Say whether one of several globs, separated by commas, means a kind of storage."""
    return any(fnmatchcase(kind, glob) for glob in kinds.split(", "))


def kind_of(storage: Storage) -> str:
    """Return how the rules call a storage: `compressed-tensors channel dynamic`."""
    method = f"{storage.quant_method}/{storage.spelling}" if storage.spelling else storage.quant_method
    return f"{method} {storage.granularity.name} {storage.activations}"


def rules_for(rules: Sequence[EngineRule], kind: str, subject: str = "") -> list[EngineRule]:
    """Return the rules that speak of a kind of storage and an architecture, role or GPU."""
    return [rule for rule in rules if rule.covers(kind, subject)]


def renaming_rules(classes: Mapping[str, str], source: str, *, loses_mx: bool = False) -> tuple[EngineRule, ...]:
    """Return the rules of classes that rename `weight_scale_inv`: architecture -> the name of the engine's loader."""
    lost = [("block scales", "fp8 block:*, auto-round block:*")]
    lost += [("MX scales", "mxfp8 mx *, modelopt mx *")] if loses_mx else []
    rules = []
    for architecture, loader in classes.items():
        for what, kinds in lost:
            text = f"its {loader} loader loses {what}"
            rules.append(EngineRule(kinds, False, source, text, DYNAMIC, INFERRED, (architecture,)))
        rules.append(EngineRule("fp8/transformers tensor *", True, source, only=(architecture,)))
    return tuple(rules)
