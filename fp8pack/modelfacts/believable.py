"""Numbers of config.json that the tensors contradict: a model is built from them before a weight is read."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fp8pack.modelfacts.spec import TensorSpec

_LAYERS = re.compile(r"(num_|n_)?(\w+_)?(hidden_)?layers?|depth|num_blocks|n_blocks")
_LABELS = ("num_labels", "num_classes", "_num_labels")
_FEW = 1000


def unbelievable(config: Mapping[str, Any], specs: Sequence[TensorSpec]) -> str:
    """Return what contradicts the tensors, as text: more layers than tensors, or more labels than elements."""
    tensors, largest = max(_FEW, len(specs)), max(_FEW, *(max(spec.shape, default=0) for spec in specs))
    for section in [config, *(value for value in config.values() if isinstance(value, Mapping))]:
        for key, value in section.items():
            if not isinstance(value, int) or isinstance(value, bool):
                continue
            if _LAYERS.fullmatch(key) and value > tensors:
                return f"has {key} = {value}, and there are {len(specs)} tensors"
            if key in _LABELS and value > largest:
                return f"has {key} = {value}, and no tensor has as many rows"
    return ""
