"""`quant_method: modelopt`: tensor scales and static activations, as NVIDIA ModelOpt exports them.

`<weight>_scale` F32 []; `<module>.input_scale` F32 []; `k_proj.k_scale`, `v_proj.v_scale` F32 []
The same is announced in config.json and in hf_quant_config.json, which TensorRT-LLM reads first.
"""

from collections.abc import Sequence
from typing import Any

from fp8pack.checkpoint.manifest import SCHEMA_VERSION
from fp8pack.checkpoint.quant_methods.fp8 import gemm_problem, refuse_mixed
from fp8pack.errors import RecipeError
from fp8pack.numerics.formats import E4M3
from fp8pack.numerics.granularity import TENSOR, Granularity
from fp8pack.planning.activation_scales import Kind
from fp8pack.planning.layout import Stored
from fp8pack.planning.plan import PackPlan
from fp8pack.planning.recipe import Recipe, Rule
from fp8pack.planning.spec import TensorSpec

_PRODUCER = {"name": "fp8pack", "version": str(SCHEMA_VERSION)}


class ModelOpt:
    """The convention of NVIDIA's FP8 checkpoints."""

    name = "modelopt"

    def check(self, recipe: Recipe, rules: Sequence[Rule]) -> None:
        """Raise RecipeError unless the recipe is e4m3 with tensor scales and static activations throughout."""
        if recipe.format != E4M3 or recipe.granularity != TENSOR or recipe.activations != "static":
            raise RecipeError(
                f"quant method modelopt holds e4m3 with tensor scales and static activations, not {recipe.format.name} "
                f"{recipe.granularity} {recipe.activations}: use --quant-method compressed-tensors or fp8pack"
            )
        refuse_mixed(self.name, recipe, rules)

    def problem(self, shape: tuple[int, ...], granularity: Granularity) -> str | None:
        """Return why a weight stays: dimensions that no FP8 GEMM takes."""
        return gemm_problem(shape)

    def scale(self, spec: TensorSpec, granularity: Granularity) -> Stored:
        """Return `weight_scale` []."""
        return Stored(f"{spec.name}_scale", "F32", ())

    def input_scale(self, name: str) -> Stored:
        """Return `input_scale` []."""
        return Stored(f"{name.removesuffix('.weight')}.input_scale", "F32", ())

    def kv_scale(self, attention: str, kind: Kind, owner: str) -> Stored:
        """Return `k_proj.k_scale` [], or `k_scale` of the attention where the projections have other names."""
        module = owner.removesuffix(".weight")
        own = module.endswith(f".{kind}_proj")
        return Stored(f"{module if own else attention}.{kind}_scale", "F32", ())

    def config(self, plan: PackPlan) -> dict[str, Any]:
        """Return what config.json says: vLLM and SGLang read it."""
        float8 = {"dynamic": False, "num_bits": 8, "type": "float"}
        return {
            "quant_method": "modelopt",
            "quant_algo": "FP8",
            "config_groups": {"group_0": {"input_activations": float8, "weights": float8, "targets": ["Linear"]}},
            "ignore": list(plan.kept_linears),
            **({"kv_cache_scheme": float8} if plan.recipe.kv_cache else {}),
            "producer": _PRODUCER,
        }

    def files(self, plan: PackPlan) -> dict[str, dict[str, Any]]:
        """Return hf_quant_config.json: TensorRT-LLM reads it."""
        quantization = {
            "quant_algo": "FP8",
            "kv_cache_quant_algo": "FP8" if plan.recipe.kv_cache else None,
            "exclude_modules": list(plan.kept_linears),
        }
        return {"hf_quant_config.json": {"producer": _PRODUCER, "quantization": quantization}}
