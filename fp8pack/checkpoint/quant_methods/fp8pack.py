"""`quant_method: fp8pack`: any format, any granularity, ragged edges; read by load_packed() alone.

`<weight>_scale_inv`: F32 with the granularity's grid, [] for a whole tensor, U8 exponents (2^(byte - 127)) for mx.
"""

from collections.abc import Sequence
from typing import Any

from fp8pack.errors import RecipeError
from fp8pack.numerics.granularity import MX, TENSOR, Granularity
from fp8pack.numerics.scaling import ScaleRounding
from fp8pack.planning.activation_scales import Kind
from fp8pack.planning.layout import Stored
from fp8pack.planning.plan import PackPlan
from fp8pack.planning.recipe import Recipe, Rule
from fp8pack.planning.spec import TensorSpec


class Fp8Pack:
    """Our own convention, for what no engine reads."""

    name = "fp8pack"

    def check(self, recipe: Recipe, rules: Sequence[Rule]) -> None:
        """Raise RecipeError for mx scales that are no powers of two: E8M0 holds nothing else."""
        if recipe.granularity == MX and recipe.scale_rounding == ScaleRounding.NONE:
            raise RecipeError("mx scales are powers of two: --scale-rounding up or floor")

    def problem(self, shape: tuple[int, ...], granularity: Granularity) -> str | None:
        """Return None: every shape can be stored."""
        return None

    def scale(self, spec: TensorSpec, granularity: Granularity) -> Stored:
        """Return `weight_scale_inv`."""
        shape = () if granularity == TENSOR else granularity.scale_shape(spec.shape)
        return Stored(f"{spec.name}_scale_inv", "U8" if granularity == MX else "F32", shape)

    def input_scale(self, name: str) -> Stored:
        """Return `input_scale` []."""
        return Stored(f"{name.removesuffix('.weight')}.input_scale", "F32", ())

    def kv_scale(self, attention: str, kind: Kind, owner: str) -> Stored:
        """Return `k_scale` or `v_scale` [] of the attention."""
        return Stored(f"{attention}.{kind}_scale", "F32", ())

    def config(self, plan: PackPlan) -> dict[str, Any]:
        """Return what a reader needs besides the manifest."""
        return {
            "quant_method": "fp8pack",
            "format": plan.recipe.format.name,
            "granularity": plan.recipe.granularity.name,
            "activation_scheme": plan.recipe.activations,
            "modules_to_not_convert": list(plan.kept_linears),
            **({"kv_cache_scheme": "static"} if plan.recipe.kv_cache else {}),
        }

    def files(self, plan: PackPlan) -> dict[str, dict[str, Any]]:
        """Return none: config.json says everything."""
        return {}
