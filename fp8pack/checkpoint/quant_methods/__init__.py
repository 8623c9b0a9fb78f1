"""The on-disk conventions that are written, one file each; checkpoint/quantized.py reads these and others."""

from collections.abc import Sequence
from dataclasses import replace

from fp8pack.checkpoint.quant_methods.comfyui import ComfyUi, ComfyUiScaled
from fp8pack.checkpoint.quant_methods.compressed_tensors import CompressedTensors
from fp8pack.checkpoint.quant_methods.convention import Convention
from fp8pack.checkpoint.quant_methods.fp8 import Fp8, Fp8ForTransformers
from fp8pack.checkpoint.quant_methods.fp8pack import Fp8Pack
from fp8pack.checkpoint.quant_methods.modelopt import ModelOpt
from fp8pack.checkpoint.quant_methods.mxfp8 import Mxfp8
from fp8pack.checkpoint.quant_methods.quark import Quark
from fp8pack.checkpoint.quant_methods.torchao import TorchAo
from fp8pack.errors import RecipeError
from fp8pack.inputs import unknown
from fp8pack.modelfacts.storage import Storage
from fp8pack.planning.recipe import Recipe, Rule

METHODS: tuple[Convention, ...] = (
    Fp8(),
    CompressedTensors(),
    ModelOpt(),
    Mxfp8(),
    TorchAo(),
    Quark(),
    ComfyUi(),
    ComfyUiScaled(),
    Fp8Pack(),
)
_SPELLINGS: dict[tuple[str, str], Convention] = {("fp8", "transformers"): Fp8ForTransformers()}


def find_method(recipe: Recipe, rules: Sequence[Rule] = ()) -> Convention:
    """Return the convention of a recipe.

    Raises:
        RecipeError: it is not known, or does not support the recipe or the mix of granularities in the rules; the hint
            names those that do.
    """
    found = {method.name: method for method in METHODS}.get(recipe.quant_method)
    if found is None:
        raise unknown("quant_method", recipe.quant_method, [method.name for method in METHODS])
    method = _SPELLINGS.get((recipe.quant_method, recipe.spelling), found)
    _check(method, recipe.storage)
    for rule in rules:
        own = replace(
            recipe.storage,
            format=rule.format or recipe.format,
            granularity=rule.granularity or recipe.granularity,
        )
        if own != recipe.storage and not method.holds_mixed:
            raise RecipeError(
                f"rule {rule.pattern.text!r}: {method.name} has one format and granularity for all weights",
                "use --quant-method fp8pack",
            )
        _check(method, own)
    return method


def _check(method: Convention, storage: Storage) -> None:
    if method.expresses(storage):
        return
    able = [other.name for other in METHODS if other.expresses(storage)]
    what = f"{storage.format.name} with {storage.granularity} scales and {storage.activations} activations"
    hint = f"use --quant-method {' or '.join(able)}" if able else "use --scale-rounding up"
    raise RecipeError(f"quant method {method.name} does not support {what}", hint)
