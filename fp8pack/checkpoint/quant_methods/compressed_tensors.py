"""`quant_method: compressed-tensors`: channel scales and MXFP8, as llm-compressor writes them.

channel  `<weight>_scale` F32 [N, 1]; activations dynamic per token, or none (W8A16)
mx       `<weight>_scale` U8 [N, K/32], value 2^(byte - 127)
Scales are float32: llm-compressor divides by BF16 scales in BF16, which misrounds about 3 % of the bytes.
"""

from collections.abc import Sequence
from typing import Any

from fp8pack.checkpoint.quant_methods.fp8 import gemm_problem, refuse_mixed
from fp8pack.errors import RecipeError
from fp8pack.numerics.formats import E4M3
from fp8pack.numerics.granularity import CHANNEL, MX, Granularity
from fp8pack.numerics.scaling import ScaleRounding
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
        """Raise RecipeError unless the recipe is e4m3 with channel scales, or mx with power-of-two scales."""
        channel = recipe.granularity == CHANNEL
        mx = (
            recipe.granularity == MX and recipe.scale_rounding != ScaleRounding.NONE and recipe.activations == "dynamic"
        )
        if recipe.format != E4M3 or not (channel or mx) or recipe.activations not in ("dynamic", "none"):
            raise RecipeError(
                f"quant method compressed-tensors holds e4m3 with channel or mx scales, not {recipe.format.name} "
                f"{recipe.granularity} with {recipe.activations} activations: use --quant-method fp8 or fp8pack"
            )
        refuse_mixed(self.name, recipe, rules)

    def problem(self, shape: tuple[int, ...], granularity: Granularity) -> str | None:
        """Return why a weight stays: a partial group of 32, or dimensions that no FP8 GEMM takes."""
        if granularity == MX and shape[1] % 32:
            return f"K = {shape[1]} is no multiple of 32"
        return gemm_problem(shape)

    def scale(self, spec: TensorSpec, granularity: Granularity) -> Stored:
        """Return `weight_scale`: F32 [N, 1] for channels, U8 [N, K/32] for mx."""
        return Stored(f"{spec.name}_scale", "U8" if granularity == MX else "F32", granularity.scale_shape(spec.shape))

    def config(self, plan: PackPlan) -> dict[str, Any]:
        """Return the schema of compressed-tensors: one group for every linear, and the modules that stay."""
        mx = plan.recipe.granularity == MX
        weights: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
        weights |= (
            {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}
            if mx
            else {"strategy": "channel"}
        )
        activations = {**weights, "dynamic": True} if mx else {**weights, "strategy": "token", "dynamic": True}
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
            "kv_cache_scheme": None,
            "version": _VERSION,
        }
