"""`quant_method: quark`, as AMD Quark 0.13 exports it.

per_tensor        `<weight>_scale` F32 []; static `<module>.input_scale` F32 []
per_channel       `<weight>_scale` F32 [N]; activations per token
per_block         `<weight>_scale` F32 [ceil(N/128), ceil(K/128)]; activations in groups of 128
per_group, e8m0   `<weight>_scale` U8 [N, K/32]
K and V: `k_proj.output_scale`, `v_proj.output_scale` F32 []
"""

from typing import Any

from fp8pack.checkpoint.quant_methods.convention import Convention
from fp8pack.modelfacts.spec import Stored, TensorSpec
from fp8pack.modelfacts.storage import Storage
from fp8pack.numerics.formats import E4M3
from fp8pack.numerics.granularity import BLOCK_128, CHANNEL, MX, TENSOR, Granularity
from fp8pack.planning.activation_scales import Kind
from fp8pack.planning.plan import PackPlan

_VERSION = "0.13"  # of the schema that is written


class Quark(Convention):
    """The convention of AMD's checkpoints."""

    name = "quark"

    def expresses(self, storage: Storage) -> bool:
        """Return whether it is e4m3 in one of Quark's four schemes; static activations go with tensor scales."""
        allowed = {TENSOR: ("static", "dynamic", "none")}.get(storage.granularity, ("dynamic", "none"))
        known = storage.granularity in (TENSOR, CHANNEL, BLOCK_128) or (
            storage.granularity == MX and storage.powers_of_two
        )
        return known and storage.format == E4M3 and storage.activations in allowed

    def scale(self, spec: TensorSpec, granularity: Granularity) -> Stored:
        """Return `weight_scale`, [N] for channels."""
        grid = super().scale(spec, granularity)
        return Stored(grid.name, grid.dtype, grid.shape[:1]) if granularity == CHANNEL else grid

    def kv_scale(self, attention: str, kind: Kind, owner: str) -> Stored:
        """Return `k_proj.output_scale` or `v_proj.output_scale` []."""
        return Stored(f"{attention}.{kind}_proj.output_scale", "F32", ())

    def config(self, plan: PackPlan) -> dict[str, Any]:
        """Return the keys of Quark's exporter; vLLM wants `export` and the group of the KV cache to be there."""
        granularity, activations = plan.recipe.granularity, plan.recipe.activations
        scheme = {
            "weight": _spec(granularity, is_dynamic=False, is_weight=True),
            "input_tensors": None
            if activations == "none"
            else _spec(granularity, is_dynamic=activations == "dynamic", is_weight=False),
            "output_tensors": None,
            "bias": None,
            "target_device": None,
        }
        cache = _spec(TENSOR, is_dynamic=False, is_weight=False)
        projections = ["*k_proj", "*v_proj"] if plan.recipe.kv_cache else []
        return {
            "quant_method": "quark",
            "quant_mode": "eager_mode",
            "version": _VERSION,
            "global_quant_config": scheme,
            "layer_quant_config": {name: {**scheme, "output_tensors": cache} for name in projections},
            "layer_type_quant_config": {},
            "exclude": list(plan.ignored_modules),
            "algo_config": None,
            "softmax_quant_spec": None,
            "kv_cache_quant_config": {name: {**scheme, "output_tensors": cache} for name in projections},
            "kv_cache_post_rope": False,
            "export": {
                "kv_cache_group": projections,
                "min_kv_scale": 0.0,
                "pack_method": "reorder",
                "weight_format": "real_quantized",
                "weight_merge_groups": None,
            },
        }


def _spec(granularity: Granularity, *, is_dynamic: bool, is_weight: bool) -> dict[str, Any]:
    """One of Quark's tensor specifications, with every key that its exporter writes."""
    scheme, group, block, axis = "per_tensor", None, None, None
    if granularity == CHANNEL:
        scheme, axis = "per_channel", 0 if is_weight else 1
    elif granularity == MX:
        scheme, group, axis = "per_group", 32, -1
    elif granularity == BLOCK_128:
        scheme, group, block, axis = (
            ("per_block", None, [128, 128], None) if is_weight else ("per_group", 128, None, -1)
        )
    return {
        "dtype": "fp8_e4m3",
        "qscheme": scheme,
        "is_dynamic": is_dynamic,
        "symmetric": True,
        "ch_axis": axis,
        "group_size": group,
        "block_size": block,
        "round_method": "half_even",
        "scale_type": "float",
        "scale_format": "e8m0" if granularity == MX else None,
        "scale_calculation_mode": None,
        "observer_cls": "PerTensorMinMaxObserver" if granularity == TENSOR else None,
        "mx_element_dtype": None,
        "is_scale_quant": False,
        "zero_point_type": None,
    }
