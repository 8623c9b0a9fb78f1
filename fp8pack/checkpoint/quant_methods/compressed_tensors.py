"""`quant_method: compressed-tensors`: channel scales and MXFP8, as llm-compressor writes them.

channel  `<weight>_scale` F32 [N, 1]; activations dynamic per token, or none (W8A16)
tensor   `<weight>_scale` F32 [1]; activations static, `<module>.input_scale` F32 [1]
mx       `<weight>_scale` U8 [N, K/32], value 2^(byte - 127)
Scales are float32: llm-compressor divides by BF16 scales in BF16, which misrounds about 3 % of the bytes.
"""

from collections.abc import Sequence
from typing import Any

from fp8pack.checkpoint.quant_methods.fp8 import gemm_problem, refuse_mixed
from fp8pack.errors import RecipeError
from fp8pack.numerics.formats import E4M3
from fp8pack.numerics.granularity import CHANNEL, MX, TENSOR, Granularity
from fp8pack.numerics.scaling import ScaleRounding
from fp8pack.planning.activation_scales import Kind
from fp8pack.planning.layout import Stored
from fp8pack.planning.plan import PackPlan
from fp8pack.planning.recipe import Recipe, Rule
from fp8pack.planning.spec import TensorSpec

# The version of the schema that is written, not a library that is needed.
_VERSION = "0.20.0"


class CompressedTensors:
    """The convention of vLLM's own quantizers."""

    name = "compressed-tensors"

    def check(self, recipe: Recipe, rules: Sequence[Rule]) -> None:
        """Raise RecipeError unless the recipe is e4m3 with channel scales, static tensor scales, or mx."""
        channel = recipe.granularity == CHANNEL and recipe.activations in ("dynamic", "none")
        tensor = recipe.granularity == TENSOR and recipe.activations == "static"
        mx = (
            recipe.granularity == MX and recipe.scale_rounding != ScaleRounding.NONE and recipe.activations == "dynamic"
        )
        if recipe.format != E4M3 or not (channel or tensor or mx):
            raise RecipeError(
                "quant method compressed-tensors holds e4m3 with channel or mx scales, or tensor scales with static "
                f"activations, not {recipe.format.name} {recipe.granularity} with {recipe.activations} activations: "
                "use --quant-method fp8 or fp8pack"
            )
        refuse_mixed(self.name, recipe, rules)

    def problem(self, shape: tuple[int, ...], granularity: Granularity) -> str | None:
        """Return why a weight stays: a partial group of 32, or dimensions that no FP8 GEMM takes."""
        if granularity == MX and shape[1] % 32:
            return f"K = {shape[1]} is no multiple of 32"
        return gemm_problem(shape)

    def scale(self, spec: TensorSpec, granularity: Granularity) -> Stored:
        """Return `weight_scale`: F32 [N, 1] for channels, [1] for a whole tensor, U8 [N, K/32] for mx."""
        if granularity == TENSOR:
            return Stored(f"{spec.name}_scale", "F32", (1,))
        return Stored(f"{spec.name}_scale", "U8" if granularity == MX else "F32", granularity.scale_shape(spec.shape))

    def input_scale(self, name: str) -> Stored:
        """Return `input_scale` [1]."""
        return Stored(f"{name.removesuffix('.weight')}.input_scale", "F32", (1,))

    def kv_scale(self, attention: str, kind: Kind, owner: str) -> Stored:
        """Return `k_scale` or `v_scale` [1] of the attention."""
        return Stored(f"{attention}.{kind}_scale", "F32", (1,))

    def config(self, plan: PackPlan) -> dict[str, Any]:
        """Return the schema of compressed-tensors: one group for every linear, and the modules that stay."""
        mx, static = plan.recipe.granularity == MX, plan.recipe.activations == "static"
        float8: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
        tensor = {**float8, "strategy": "tensor"}
        if mx:
            group_of_32 = {"group_size": 32, "scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}
            weights = {**float8, "strategy": "group", **group_of_32}
            activations = {**weights, "dynamic": True}
        elif static:
            weights = activations = tensor
        else:
            weights = {**float8, "strategy": "channel"}
            activations = {**float8, "strategy": "token", "dynamic": True}
        weight_only = plan.recipe.activations == "none"
        format = "mxfp8-quantized" if mx else "naive-quantized" if weight_only else "float-quantized"
        group = {
            "format": format,
            "input_activations": None if weight_only else activations,
            "output_activations": None,
            "targets": ["Linear"],
            "weights": weights,
        }
        return {
            "quant_method": "compressed-tensors",
            "format": format,
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": list(plan.kept_linears),
            "kv_cache_scheme": tensor if plan.recipe.kv_cache else None,
            "version": _VERSION,
        }

    def files(self, plan: PackPlan) -> dict[str, dict[str, Any]]:
        """Return none: config.json says everything."""
        return {}
