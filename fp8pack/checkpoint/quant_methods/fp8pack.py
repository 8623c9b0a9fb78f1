"""`quant_method: fp8pack`: any format, any granularity, ragged edges; read by load_packed() alone.

`<weight>_scale_inv`: F32 with the granularity's grid, [] for a whole tensor, U8 exponents (2^(byte - 127)) for mx.
"""

from typing import Any

from fp8pack.checkpoint.quant_methods.convention import Convention
from fp8pack.modelfacts.spec import Stored, TensorSpec
from fp8pack.modelfacts.storage import Storage
from fp8pack.numerics.granularity import MX, Granularity
from fp8pack.planning.plan import PackPlan


class Fp8Pack(Convention):
    """Our own convention, for what no engine reads."""

    name = "fp8pack"
    holds_mixed = True
    holds_head_scales = True

    def expresses(self, storage: Storage) -> bool:
        """Return whether it is anything but mx scales that are no powers of two: E8M0 holds nothing else."""
        return storage.granularity != MX or storage.powers_of_two

    def problem(self, shape: tuple[int, ...], granularity: Granularity) -> str | None:
        """Return None: every shape can be stored."""
        return None

    def scale(self, spec: TensorSpec, granularity: Granularity) -> Stored:
        """Return `weight_scale_inv`."""
        return self.grid(f"{spec.name}_scale_inv", spec, granularity)

    def config(self, plan: PackPlan) -> dict[str, Any]:
        """Return what a reader needs besides the manifest."""
        return {
            "quant_method": "fp8pack",
            "format": plan.recipe.format.name,
            "granularity": plan.recipe.granularity.name,
            "activation_scheme": plan.recipe.activations,
            "modules_to_not_convert": list(plan.ignored_modules),
            **({"kv_cache_scheme": "static"} if plan.recipe.kv_cache else {}),
        }
