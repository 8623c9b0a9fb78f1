"""What an engine's code says of its model classes: the files in data/, which tools/read_engines.py writes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

_DATA = Path(__file__).parent / "data"


@dataclass(frozen=True, slots=True)
class ClassFacts:
    """A model class of an engine.

    unquantized: linears that it builds without a quantization config, by the last part of their names. unknown: those
    of which parsing does not tell. fused: its fused linears and their parts. merged: linears that are one in the files
    and several in the class -> how many. kv_scales: whether it loads scales of K and V, None if that was not read.
    tied: linears whose weight is that of an embedding.
    """

    unquantized: frozenset[str] = frozenset()
    unknown: frozenset[str] = frozenset()
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    kv_scales: bool | None = None
    merged: Mapping[str, int] = field(default_factory=dict)
    tied: tuple[str, ...] = ()

    def find(self, leaf: str, among: frozenset[str]) -> str:
        """Return the linear of the engine that a checkpoint's is stored in, if it is among these; else empty."""
        wholes = (whole for whole, parts in self.fused.items() if leaf in parts)
        return next((name for name in (leaf, *wholes) if name in among), "")


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """The classes of one version of an engine, by the architecture in config.json.

    falls_back: it runs other classes through transformers, if they allow that. removed: classes that it had, and the
    last version with them. model_types: of an engine that chooses by `model_type` instead.
    """

    engine: str
    version: str
    falls_back: bool
    removed: Mapping[str, str]
    classes: Mapping[str, ClassFacts]
    model_types: frozenset[str] = frozenset()


@cache
def read_class_facts(name: str) -> EngineFacts | None:
    """Return the facts of a data file, such as `vllm-0.33.0`; None for an empty name."""
    if not name:
        return None
    document: dict[str, Any] = json.loads((_DATA / f"{name}.json").read_bytes())
    return EngineFacts(
        engine=document["engine"],
        version=document["version"],
        falls_back=document["falls_back"],
        removed=document["removed"],
        classes={architecture: _class_facts(entry) for architecture, entry in document["classes"].items()},
        model_types=frozenset(document.get("model_types", ())),
    )


def _class_facts(entry: Mapping[str, Any]) -> ClassFacts:
    return ClassFacts(
        unquantized=frozenset(entry.get("unquantized", ())),
        unknown=frozenset(entry.get("unknown", ())),
        fused={whole: tuple(parts) for whole, parts in entry.get("fused", {}).items()},
        kv_scales=entry.get("kv_scales"),
        merged=entry.get("merged", {}),
        tied=tuple(entry.get("tied", ())),
    )
