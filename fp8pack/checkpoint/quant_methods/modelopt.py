"""`quant_method: modelopt`, as NVIDIA ModelOpt exports it.

algorithm                    granularity, activations   `<weight>_scale`
FP8                          tensor, static             F32 []; `<module>.input_scale` F32 []
FP8_PER_CHANNEL_PER_TOKEN    channel, dynamic           F32 [N]
fp8_pb_wo                    block:128x128, dynamic     F32 [rows, 1, cols, 1]
MXFP8                        mx, dynamic                U8 [N, K/32]
K and V: `k_proj.k_scale`, `v_proj.v_scale` F32 []. All is announced in config.json and in hf_quant_config.json, which
TensorRT-LLM reads first.
"""

from typing import Any

from fp8pack.checkpoint.manifest import SCHEMA_VERSION
from fp8pack.checkpoint.quant_methods.convention import Convention
from fp8pack.modelfacts.spec import Stored, TensorSpec
from fp8pack.modelfacts.storage import Storage
from fp8pack.numerics.formats import E4M3
from fp8pack.numerics.granularity import BLOCK_128, CHANNEL, MX, TENSOR, Granularity
from fp8pack.planning.activation_scales import Kind
from fp8pack.planning.plan import PackPlan

_PRODUCER = {"name": "fp8pack", "version": str(SCHEMA_VERSION)}
_ALGORITHMS = {
    (TENSOR, "static"): "FP8",
    (CHANNEL, "dynamic"): "FP8_PER_CHANNEL_PER_TOKEN",
    (BLOCK_128, "dynamic"): "fp8_pb_wo",
    (MX, "dynamic"): "MXFP8",
}


class ModelOpt(Convention):
    """The convention of NVIDIA's FP8 checkpoints."""

    name = "modelopt"

    def expresses(self, storage: Storage) -> bool:
        """Return whether there is an algorithm for it."""
        known = (storage.granularity, storage.activations) in _ALGORITHMS
        return known and storage.format == E4M3 and (storage.powers_of_two or storage.granularity != MX)

    def scale(self, spec: TensorSpec, granularity: Granularity) -> Stored:
        """Return `weight_scale` in the shape of its algorithm."""
        grid = super().scale(spec, granularity)
        if granularity == CHANNEL:
            return Stored(grid.name, grid.dtype, grid.shape[:1])
        if granularity == BLOCK_128:
            rows, cols = grid.shape
            return Stored(grid.name, grid.dtype, (rows, 1, cols, 1))
        return grid

    def kv_scale(self, attention: str, kind: Kind, owner: str) -> Stored:
        """Return `k_proj.k_scale` [], or `k_scale` of the attention where the projections have other names."""
        module = owner.removesuffix(".weight")
        own = module.endswith(f".{kind}_proj")
        return Stored(f"{module if own else attention}.{kind}_scale", "F32", ())

    def config(self, plan: PackPlan) -> dict[str, Any]:
        """Return what config.json says: vLLM and SGLang read it."""
        float8 = {"dynamic": False, "num_bits": 8, "type": "float"}
        algorithm = _algorithm(plan)
        groups = {"group_0": {"input_activations": float8, "weights": float8, "targets": ["Linear"]}}
        return {
            "quant_method": "modelopt",
            "quant_algo": algorithm,
            **({"config_groups": groups} if algorithm == "FP8" else {}),
            **({"group_size": 32} if algorithm == "MXFP8" else {}),
            "ignore": list(plan.ignored_modules),
            **({"kv_cache_scheme": float8} if plan.recipe.kv_cache else {}),
            "producer": _PRODUCER,
        }

    def files(self, plan: PackPlan) -> dict[str, dict[str, Any]]:
        """Return hf_quant_config.json: TensorRT-LLM reads it."""
        algorithm = _algorithm(plan)
        quantization = {
            "quant_algo": algorithm,
            "kv_cache_quant_algo": "FP8" if plan.recipe.kv_cache else None,
            **({"group_size": 32} if algorithm == "MXFP8" else {}),
            "exclude_modules": list(plan.ignored_modules),
        }
        return {"hf_quant_config.json": {"producer": _PRODUCER, "quantization": quantization}}


def _algorithm(plan: PackPlan) -> str:
    return _ALGORITHMS[plan.recipe.granularity, plan.recipe.activations]
