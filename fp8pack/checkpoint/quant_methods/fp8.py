"""`quant_method: fp8`: DeepSeek's block scales, and tensor scales as AutoFP8 or as transformers spell them.

block:128x128  `<weight>_scale_inv` F32 [ceil(N/128), ceil(K/128)]   docs/format.md, "fp8"
tensor         `<weight>_scale` F32 [], `<module>.input_scale` []: vLLM, SGLang, TGI
               `<weight>_scale_inv` F32 [], `<module>.activation_scale` []: transformers, Mistral's checkpoints
All are multipliers: value = fp8 * scale.
"""

from typing import Any

from fp8pack.checkpoint.quant_methods.convention import Convention
from fp8pack.modelfacts.spec import Stored, TensorSpec
from fp8pack.modelfacts.storage import Storage
from fp8pack.numerics.formats import E4M3
from fp8pack.numerics.granularity import BLOCK_128, TENSOR, Granularity
from fp8pack.numerics.rounding import ScaleRounding
from fp8pack.planning.plan import PackPlan


class Fp8(Convention):
    """The convention of DeepSeek-V3, Qwen3 and AutoFP8 checkpoints."""

    name = "fp8"

    def expresses(self, storage: Storage) -> bool:
        """Return whether it is e4m3 with dynamic block:128x128 scales, or dynamic or static tensor scales."""
        block = storage.granularity == BLOCK_128 and storage.activations == "dynamic"
        tensor = storage.granularity == TENSOR and storage.activations in ("dynamic", "static")
        return storage.format == E4M3 and (block or tensor)

    def scale(self, spec: TensorSpec, granularity: Granularity) -> Stored:
        """Return `weight_scale_inv` for blocks, `weight_scale` for a whole tensor."""
        return self.grid(f"{spec.name}_scale" if granularity == TENSOR else f"{spec.name}_scale_inv", spec, granularity)

    def config(self, plan: PackPlan) -> dict[str, Any]:
        """Return the keys that vLLM, SGLang, TensorRT-LLM and transformers read."""
        recipe = plan.recipe
        kv_cache = {"kv_cache_scheme": "static"} if recipe.kv_cache else {}
        if recipe.granularity == TENSOR:
            return {
                "quant_method": "fp8",
                "activation_scheme": recipe.activations,
                "ignored_layers": list(plan.ignored_modules),
                **kv_cache,
            }
        return {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            **({"scale_fmt": "ue8m0"} if recipe.scale_rounding != ScaleRounding.NONE else {}),
            "weight_block_size": [128, 128],
            "modules_to_not_convert": list(plan.ignored_modules),
            **kv_cache,
        }


class Fp8ForTransformers(Fp8):
    """Tensor scales under the names that transformers reads; it takes a missing block size for 128 x 128."""

    def expresses(self, storage: Storage) -> bool:
        """Return whether they are tensor scales."""
        return super().expresses(storage) and storage.granularity == TENSOR

    def scale(self, spec: TensorSpec, granularity: Granularity) -> Stored:
        """Return `weight_scale_inv` []."""
        return self.grid(f"{spec.name}_scale_inv", spec, granularity)

    def input_scale(self, name: str) -> Stored:
        """Return `activation_scale` []."""
        return Stored(f"{name.removesuffix('.weight')}.activation_scale", "F32", ())

    def config(self, plan: PackPlan) -> dict[str, Any]:
        """Return the keys of FineGrainedFP8Config."""
        return {
            "quant_method": "fp8",
            "activation_scheme": plan.recipe.activations,
            "fmt": "e4m3",
            "weight_block_size": None,
            "modules_to_not_convert": list(plan.ignored_modules),
            **({"kv_cache_scheme": "static"} if plan.recipe.kv_cache else {}),
        }
