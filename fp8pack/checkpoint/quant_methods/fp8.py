"""`quant_method: fp8`: DeepSeek's block scales, and AutoFP8's tensor scales as vLLM and SGLang read them.

block:128x128  `<weight>_scale_inv` F32 [ceil(N/128), ceil(K/128)]   docs/format.md, "fp8"
tensor         `<weight>_scale` F32 []
Both are multipliers: value = fp8 * scale.
"""

from collections.abc import Sequence
from typing import Any

from fp8pack.errors import RecipeError
from fp8pack.numerics.formats import E4M3
from fp8pack.numerics.granularity import BLOCK_128, TENSOR, Granularity
from fp8pack.numerics.scaling import ScaleRounding
from fp8pack.planning.activation_scales import Kind
from fp8pack.planning.layout import Stored
from fp8pack.planning.plan import PackPlan
from fp8pack.planning.recipe import Recipe, Rule
from fp8pack.planning.spec import TensorSpec


class Fp8:
    """The convention of DeepSeek-V3, Qwen3 and AutoFP8 checkpoints."""

    name = "fp8"

    def check(self, recipe: Recipe, rules: Sequence[Rule]) -> None:
        """Raise RecipeError unless the recipe is e4m3, dynamic, and block:128x128 or tensor throughout."""
        if recipe.format != E4M3 or recipe.granularity not in (BLOCK_128, TENSOR) or recipe.activations != "dynamic":
            raise RecipeError(
                f"quant method fp8 holds e4m3 with block:128x128 or tensor scales and dynamic activations, not "
                f"{recipe.format.name} {recipe.granularity} {recipe.activations}: use --quant-method fp8pack"
            )
        refuse_mixed(self.name, recipe, rules)

    def problem(self, shape: tuple[int, ...], granularity: Granularity) -> str | None:
        """Return why a weight stays: a partial block, or dimensions that no FP8 GEMM takes."""
        if granularity == BLOCK_128 and not granularity.fits(shape):
            return f"{shape[0]} x {shape[1]} is no multiple of 128: --scheme FP8_DYNAMIC packs it"
        return gemm_problem(shape)

    def scale(self, spec: TensorSpec, granularity: Granularity) -> Stored:
        """Return `weight_scale_inv` [rows, cols] for blocks, `weight_scale` [] for a whole tensor."""
        if granularity == TENSOR:
            return Stored(f"{spec.name}_scale", "F32", ())
        return Stored(f"{spec.name}_scale_inv", "F32", granularity.scale_shape(spec.shape))

    def input_scale(self, name: str) -> Stored:
        """Return `input_scale` []."""
        return Stored(f"{name.removesuffix('.weight')}.input_scale", "F32", ())

    def kv_scale(self, attention: str, kind: Kind, owner: str) -> Stored:
        """Return `k_scale` or `v_scale` [] of the attention."""
        return Stored(f"{attention}.{kind}_scale", "F32", ())

    def config(self, plan: PackPlan) -> dict[str, Any]:
        """Return the keys that vLLM, SGLang, TensorRT-LLM and transformers read."""
        kv_cache = {"kv_cache_scheme": "static"} if plan.recipe.kv_cache else {}
        if plan.recipe.granularity == TENSOR:
            ignored = list(plan.kept_linears)
            return {"quant_method": "fp8", "activation_scheme": "dynamic", "ignored_layers": ignored, **kv_cache}
        powers_of_two = plan.recipe.scale_rounding != ScaleRounding.NONE
        return {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            **({"scale_fmt": "ue8m0"} if powers_of_two else {}),
            "weight_block_size": [128, 128],
            "modules_to_not_convert": list(plan.kept_linears),
            **kv_cache,
        }

    def files(self, plan: PackPlan) -> dict[str, dict[str, Any]]:
        """Return none: config.json says everything."""
        return {}


def gemm_problem(shape: tuple[int, ...]) -> str | None:
    """Return why no FP8 GEMM takes a weight: cuBLASLt and CUTLASS want N and K in multiples of 16."""
    n, k = shape
    return f"{n} x {k} is no multiple of 16: no FP8 GEMM takes it" if n % 16 or k % 16 else None


def refuse_mixed(method: str, recipe: Recipe, rules: Sequence[Rule]) -> None:
    """Raise RecipeError if a rule asks for another format or granularity than the one a checkpoint can announce."""
    for rule in rules:
        if rule.format not in (None, recipe.format) or rule.granularity not in (None, recipe.granularity):
            raise RecipeError(
                f"rule {rule.pattern.text!r}: {method} holds one format and granularity: use quant_method fp8pack"
            )
