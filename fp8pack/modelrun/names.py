"""Mapping of parameter names in memory to tensor names of the checkpoint.

transformers 5 renames and merges tensors while it loads them: the experts of a layer become 3-D parameters, prefixes
are added and removed. Statistics are recorded under the checkpoint's names, which packing uses.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

_EXPERT = re.compile(r"(?P<parent>.+)\.(?P<index>\d+)\.(?P<leaf>\w+)$")
_SPLIT_EXPERTS = {"gate_up_proj": ("gate_proj", "up_proj")}  # the engines' names of the parts of a fused 3-D tensor


class Names:
    """The checkpoint's tensors of each parameter in memory; a parameter without an entry has the same name."""

    def __init__(self, tensors: Mapping[str, Iterable[str]]) -> None:
        self.tensors = {parameter: tuple(names) for parameter, names in tensors.items()}
        self._places: dict[str, str] = {}
        for parameter, names in self.tensors.items():
            module, suffix = parameter, ""
            while module:
                module, _, leaf = module.rpartition(".")
                suffix = f".{leaf}{suffix}"
                if f".{names[0]}".endswith(suffix):
                    self._places.setdefault(module, f".{names[0]}".removesuffix(suffix).removeprefix("."))

    def of_parameter(self, parameter: str) -> tuple[str, ...]:
        """Return the checkpoint's tensors that a parameter in memory was loaded from."""
        return self.tensors.get(parameter, (parameter,))

    def of_linear(self, module: str) -> tuple[str, ...]:
        """Return the modules of the checkpoint whose weights a module in memory has."""
        if f"{module}.weight" in self.tensors:
            return tuple(name.removesuffix(".weight") for name in self.tensors[f"{module}.weight"])
        return (self.of_place(module),)

    def of_place(self, module: str) -> str:
        """Return the checkpoint's name of a module that may have no tensor itself."""
        if module in self._places:
            return self._places[module]
        parent, _, leaf = module.rpartition(".")
        return f"{self.of_place(parent)}.{leaf}" if parent else module

    def of_experts(self, parameter: str, count: int) -> list[list[str]]:
        """Return the modules of each of `count` experts in a 3-D parameter that contains all of them."""
        names = [name.removesuffix(".weight") for name in self.of_parameter(parameter)]
        found: list[list[str]] = [[] for _ in range(count)]
        for match in filter(None, map(_EXPERT.fullmatch, names)):
            found[int(match["index"])].append(match[0])
        if not any(found):
            parent, _, leaf = names[0].rpartition(".")
            parent = parent if parent.endswith("experts") else f"{parent}.experts"
            parts = _SPLIT_EXPERTS.get(leaf, (leaf,))
            found = [[f"{parent}.{index}.{part}" for part in parts] for index in range(count)]
        return found


def names_of(model: Any, checkpoint: Iterable[str] | None = None) -> Names:
    """Return the names of a transformers model's checkpoint.

    checkpoint: the names of its tensors; by default those that `save_pretrained` would write.
    """
    from fp8pack.modelrun.transformers_internals import renamed  # imports transformers, which takes seconds

    found: dict[str, list[str]] = {}
    for parameter, name in renamed(model, checkpoint):
        found.setdefault(parameter, []).append(name)
    return Names({parameter: sorted(names, key=_natural) for parameter, names in found.items()})


def is_transformers_model(model: torch.nn.Module) -> bool:
    """Say whether a model is a transformers model, without importing transformers for others."""
    return any(base.__module__ == "transformers.modeling_utils" for base in type(model).__mro__)


def transformers_parts(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """Return paths and modules of the outermost transformers models within a model."""
    parts: list[tuple[str, torch.nn.Module]] = []
    for path, module in model.named_modules():
        within = any(not outer or path.startswith(f"{outer}.") for outer, _ in parts)
        if not within and is_transformers_model(module):
            parts.append((path, module))
    return parts


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]
