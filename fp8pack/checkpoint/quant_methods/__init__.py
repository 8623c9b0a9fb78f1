"""The on-disk conventions, one file each behind the same functions."""

from typing import Any, Protocol

from fp8pack.checkpoint.quant_methods.compressed_tensors import CompressedTensors
from fp8pack.checkpoint.quant_methods.fp8 import Fp8
from fp8pack.checkpoint.quant_methods.fp8pack import Fp8Pack
from fp8pack.checkpoint.quant_methods.modelopt import ModelOpt
from fp8pack.errors import RecipeError
from fp8pack.planning.plan import PackPlan, QuantMethod


class WrittenMethod(QuantMethod, Protocol):
    """A convention that can also announce itself in config.json."""

    def config(self, plan: PackPlan) -> dict[str, Any]:
        """Return the `quantization_config` of a packed checkpoint."""
        ...

    def files(self, plan: PackPlan) -> dict[str, dict[str, Any]]:
        """Return the JSON files that stand beside config.json, by name."""
        ...


METHODS: tuple[WrittenMethod, ...] = (Fp8(), CompressedTensors(), ModelOpt(), Fp8Pack())


def find_method(text: str) -> WrittenMethod:
    """Return the convention of a name, `_` as `-`, in any case."""
    name = text.lower().replace("_", "-")
    for method in METHODS:
        if method.name == name:
            return method
    raise RecipeError(f"quant method {text!r} is not known: choose {', '.join(method.name for method in METHODS)}")
