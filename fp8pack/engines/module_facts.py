"""How transformers builds the modules of its classes: the file in data/ that tools/read_modules.py writes."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from fp8pack.modelfacts.experts import FusedLayout
from fp8pack.modelfacts.patterns import star

_EXPERTS = re.compile(r"((?:.+\.)?experts)\.(?:\*\.)?\w+$")
_DATA = Path(__file__).parent / "data"


@dataclass(frozen=True, slots=True)
class ModuleFacts:
    """Where the modules of a class differ from its files; numbers in names are `*`, and `.weight` is left out.

    names: prefixes of names in files -> those of the modules. converted: tensors that are split, permuted or transposed
    at load. joined: linears that are put one after the other. merged: experts, one by one in the files, that are put
    together. fused: experts that the files have in one tensor. transposed: of these, [E, K, N]. subclasses: linears of
    a class of their own. others: modules that multiply and are no linears. linears: linears that are named as
    embeddings or norms. wide: modules that are kept in float32, as transformers matches them. unfit: experts that its
    FP8 class is not made for. has_scale: parameters that are called `scale` are taken for scales. refused: quant
    methods with which transformers does not build the class. missed: linears that it does not find in a list of
    ignored modules.
    """

    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    converted: frozenset[str] = frozenset()
    joined: frozenset[str] = frozenset()
    merged: frozenset[str] = frozenset()
    fused: frozenset[str] = frozenset()
    subclasses: frozenset[str] = frozenset()
    others: frozenset[str] = frozenset()
    wide: tuple[str, ...] = ()
    unfit: frozenset[str] = frozenset()
    has_scale: bool = False
    linears: frozenset[str] = frozenset()
    refused: frozenset[str] = frozenset()
    missed: frozenset[str] = frozenset()
    transposed: frozenset[str] = frozenset()

    def modules(self, name: str) -> tuple[str, ...]:
        """Return the modules that a tensor, named without `.weight`, is loaded into."""
        stem = one_number(name)
        stem = stem if stem in self.names else star(name)
        numbers = [part for part in name.split(".") if part.isdecimal()]
        return tuple(_numbered(path, numbers) for path in find_modules(stem, self.names))

    def widens(self, name: str) -> bool:
        """Say whether a tensor stays in float32 where the model is loaded in 16 bits; an entry may match anywhere."""
        stem = name.removesuffix(".weight")
        names = (name, *(path + name[len(stem) :] for path in self.modules(stem)))
        return any(re.search(entry.replace("*", ".*"), path) for entry in self.wide for path in names)

    @property
    def fused_layouts(self) -> Mapping[str, FusedLayout | None]:
        """The tensors that hold all experts of a layer in the files -> how they lie, None if that is converted."""
        layouts = {stem: FusedLayout(transposed=experts_of(stem) in self.transposed) for stem in self.fused}
        return layouts | {stem: None for stem in self.converted if experts_of(stem)}

    @property
    def experts(self) -> frozenset[str]:
        """The modules that hold all experts of a layer in one tensor, as they are named in files and in the model."""
        stems = self.merged | self.fused | {stem for stem in self.converted if experts_of(stem)}
        paths = (path for stem in stems for path in (experts_of(stem), *find_modules(stem, self.names)))
        return frozenset(filter(None, paths))


@cache
def read_module_facts(name: str, cls: str, model_type: str = "") -> ModuleFacts | None:
    """Return a class of a data file, such as `transformers-5.24.0-modules`; None where there is nothing to say.

    A class may be built otherwise for a model type that is not its own.
    """
    entries = _read_entries(name) if name else {}
    entry = entries.get(f"{cls} {model_type}", entries.get(cls))
    return None if entry is None else _module_facts(entry)


@cache
def _read_entries(name: str) -> Mapping[str, Mapping[str, Any]]:
    classes: Mapping[str, Mapping[str, Any]] = json.loads((_DATA / f"{name}.json").read_bytes())["classes"]
    return classes


def experts_of(stem: str) -> str:
    """Return the module of a tensor of experts by its name, empty for other tensors."""
    match = _EXPERTS.match(stem)
    return match[1] if match else ""


def one_number(name: str) -> str:
    """Return a name with `*` for each number but the last, which may tell two modules apart."""
    parts = name.split(".")
    last = max((i for i, part in enumerate(parts) if part.isdecimal()), default=-1)
    return ".".join("*" if part.isdecimal() and i != last else part for i, part in enumerate(parts))


def find_modules(stem: str, names: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the modules of a tensor: by the longest prefix that is known, and one for all experts of a layer."""
    parts = stem.split(".")
    for count in range(len(parts), 0, -1):
        if heads := names.get(".".join(parts[:count])):
            found = [".".join([head, *parts[count:]]) for head in heads]
            break
    else:
        found = [stem]
    return list(dict.fromkeys(experts_of(path) or path for path in found))


def is_kept(path: str, entries: Sequence[str]) -> bool:
    """Say whether transformers keeps a module, by its prefix, an expression over it, or its end."""
    boundary = r"(?:(?<=\.)|(?=\.|$))"
    return any(re.match(rf"(?:{entry}){boundary}", path) or path.endswith(entry) for entry in entries)


def _numbered(path: str, numbers: Sequence[str]) -> str:
    rest = iter(numbers)
    return ".".join(next(rest, "*") if part == "*" else part for part in path.split("."))


def _module_facts(entry: Mapping[str, Any]) -> ModuleFacts:
    unlike: Mapping[str, str] = entry.get("unlike", {})
    return ModuleFacts(
        names={prefix: tuple(paths) for prefix, paths in entry.get("names", {}).items()},
        converted=frozenset(entry.get("converted", ())),
        joined=frozenset(entry.get("joined", ())),
        merged=frozenset(entry.get("merged", ())),
        fused=frozenset(entry.get("fused", ())),
        subclasses=frozenset(path for path, kind in unlike.items() if kind == "linear"),
        others=frozenset(path for path, kind in unlike.items() if kind == "other"),
        wide=tuple(entry.get("wide", ())),
        unfit=frozenset(entry.get("unfit", ())),
        has_scale=entry.get("scale", False),
        linears=frozenset(entry.get("linears", ())),
        refused=frozenset(entry.get("refused", ())),
        missed=frozenset(entry.get("missed", ())),
        transposed=frozenset(entry.get("transposed", ())),
    )
