"""`quant_method: mxfp8`: MiniMax-M3's files, which SGLang, TensorRT-LLM and transformers read for any model.

mx  `<weight>_scale_inv` U8 [N, K/32], value 2^(byte - 127); activations dynamic
"""

from typing import Any

from fp8pack.checkpoint.quant_methods.convention import Convention
from fp8pack.modelfacts.spec import Stored, TensorSpec
from fp8pack.modelfacts.storage import Storage
from fp8pack.numerics.formats import E4M3
from fp8pack.numerics.granularity import MX, Granularity
from fp8pack.planning.plan import PackPlan


class Mxfp8(Convention):
    """Microscaling under the names of DeepSeek's convention."""

    name = "mxfp8"

    def expresses(self, storage: Storage) -> bool:
        """Return whether it is e4m3 with mx scales and dynamic activations."""
        mx = storage.granularity == MX and storage.powers_of_two
        return mx and storage.format == E4M3 and storage.activations == "dynamic"

    def scale(self, spec: TensorSpec, granularity: Granularity) -> Stored:
        """Return `weight_scale_inv`."""
        return self.grid(f"{spec.name}_scale_inv", spec, granularity)

    def config(self, plan: PackPlan) -> dict[str, Any]:
        """Return the keys of DeepSeek's convention, with groups of 32."""
        return {
            "quant_method": "mxfp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [1, 32],
            "scale_fmt": "ue8m0",
            "modules_to_not_convert": list(plan.ignored_modules),
            **({"kv_cache_scheme": "static"} if plan.recipe.kv_cache else {}),
        }
