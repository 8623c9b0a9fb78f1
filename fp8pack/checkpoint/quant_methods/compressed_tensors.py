"""`quant_method: compressed-tensors`, as llm-compressor writes it.

tensor   `<weight>_scale` F32 [1]         activations dynamic, static (`<module>.input_scale` F32 [1]) or none
channel  `<weight>_scale` F32 [N, 1]      dynamic per token, static or none
block    `<weight>_scale` F32 [rows, cols]   dynamic in groups of a block's width, or none
group:G  `<weight>_scale` F32 [N, K/G]    likewise
mx       `<weight>_scale` U8 [N, K/32], value 2^(byte - 127)   likewise
Scales are float32: llm-compressor divides by BF16 scales in BF16, which misrounds about 3 % of the bytes.
"""

from math import prod
from typing import Any

from fp8pack.checkpoint.quant_methods.convention import Convention
from fp8pack.modelfacts.spec import Stored, TensorSpec
from fp8pack.modelfacts.storage import Storage
from fp8pack.numerics.formats import E4M3
from fp8pack.numerics.granularity import CHANNEL, MX, TENSOR, Granularity
from fp8pack.planning.activation_scales import Kind
from fp8pack.planning.plan import PackPlan

# The version of the schema that is written, not a library that is needed.
_VERSION = "0.20.0"
_FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}


class CompressedTensors(Convention):
    """The convention of vLLM's own quantizers."""

    name = "compressed-tensors"
    holds_head_scales = True

    def expresses(self, storage: Storage) -> bool:
        """Return whether it is e4m3; static activations go with tensor and channel scales only."""
        static = storage.activations == "static"
        fits = not static or storage.granularity in (TENSOR, CHANNEL)
        return storage.format == E4M3 and fits and (storage.powers_of_two or storage.granularity != MX)

    def scale(self, spec: TensorSpec, granularity: Granularity) -> Stored:
        """Return `weight_scale`, [1] for a whole tensor."""
        name = f"{spec.name}_scale"
        return Stored(name, "F32", (1,)) if granularity == TENSOR else self.grid(name, spec, granularity)

    def input_scale(self, name: str) -> Stored:
        """Return `input_scale` [1]."""
        return Stored(f"{name.removesuffix('.weight')}.input_scale", "F32", (1,))

    def kv_scale(self, attention: str, kind: Kind, owner: str) -> Stored:
        """Return `k_scale` or `v_scale` [1] of the attention."""
        return Stored(f"{attention}.{kind}_scale", "F32", (1,))

    def config(self, plan: PackPlan) -> dict[str, Any]:
        """Return the schema of compressed-tensors: one group for every linear, and the modules that stay."""
        granularity, activations = plan.recipe.granularity, plan.recipe.activations
        weights = {**_FLOAT8, **_strategy(granularity)}
        if activations == "static":
            inputs: dict[str, Any] | None = {**_FLOAT8, "strategy": "tensor"}
        else:
            inputs = {**_FLOAT8, **_input_strategy(granularity), "dynamic": True} if activations == "dynamic" else None
        format = "naive-quantized" if activations == "none" else "float-quantized"
        format = "mxfp8-quantized" if granularity == MX else format
        group = {
            "format": format,
            "input_activations": inputs,
            "output_activations": None,
            "targets": ["Linear"],
            "weights": weights,
        }
        return {
            "quant_method": "compressed-tensors",
            "format": format,
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": list(plan.ignored_modules),
            "kv_cache_scheme": {**_FLOAT8, "strategy": _kv_strategy(plan)} if plan.recipe.kv_cache else None,
            "version": _VERSION,
        }


def _kv_strategy(plan: PackPlan) -> str:
    """One scale for K and one for V, or one for each head, as a conversion may have carried them."""
    of_heads = any(tensor.role == "activation_scale" and prod(tensor.data.shape) > 1 for tensor in plan.tensors)
    return "attn_head" if of_heads else "tensor"


def _strategy(granularity: Granularity) -> dict[str, Any]:
    if granularity in (TENSOR, CHANNEL):
        return {"strategy": granularity.name}
    if granularity == MX:
        return {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}
    if granularity.rows == 1:
        return {"strategy": "group", "group_size": granularity.cols}
    return {"strategy": "block", "block_structure": [granularity.rows, granularity.cols]}


def _input_strategy(granularity: Granularity) -> dict[str, Any]:
    """What dynamic activations share a scale: what the engines' kernels want beside such weights."""
    if granularity == TENSOR:
        return {"strategy": "tensor"}
    if granularity in (CHANNEL, MX):
        return {"strategy": "token"} if granularity == CHANNEL else _strategy(MX)
    return {"strategy": "group", "group_size": granularity.cols}
