"""What most conventions have in common; each file of this room says what one of them does otherwise."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from fp8pack.numerics.formats import Float8Format
from fp8pack.numerics.granularity import CHANNEL, MX, TENSOR, Granularity
from fp8pack.planning.activation_scales import Kind
from fp8pack.planning.layout import Constant, Stored
from fp8pack.planning.plan import PackPlan, TensorPlan
from fp8pack.planning.spec import TensorSpec
from fp8pack.planning.storage import Storage


class Convention(ABC):
    """`weight` and `weight_scale`, float32 multipliers, [] for a whole tensor, U8 exponents for mx; announced in JSON.

    holds_mixed: whether weights may differ in format and granularity. holds_head_scales: whether K and V may have a
    scale for each head.
    """

    name = ""
    holds_mixed = False
    holds_head_scales = False

    @abstractmethod
    def expresses(self, storage: Storage) -> bool:
        """See QuantMethod."""

    def problem(self, shape: tuple[int, ...], granularity: Granularity) -> str | None:
        """Return why a weight stays: a region that reaches over its edge, or dimensions that no FP8 GEMM takes."""
        if granularity not in (TENSOR, CHANNEL) and not granularity.fits(shape):
            if granularity.rows == 1:
                return f"K = {shape[1]} is no multiple of {granularity.cols}"
            return f"{shape[0]} x {shape[1]} is no multiple of {granularity.rows}: --scheme FP8_DYNAMIC packs it"
        n, k = shape
        return f"{n} x {k} is no multiple of 16: no FP8 GEMM takes it" if n % 16 or k % 16 else None

    def payload(self, spec: TensorSpec, format: Float8Format) -> Stored:
        """Return the weight's own name."""
        return Stored(spec.name, format.dtype, spec.shape)

    def scale(self, spec: TensorSpec, granularity: Granularity) -> Stored:
        """Return `weight_scale`."""
        return self.grid(f"{spec.name}_scale", spec, granularity)

    def grid(self, name: str, spec: TensorSpec, granularity: Granularity) -> Stored:
        """Return a scale tensor with the granularity's grid."""
        shape = () if granularity == TENSOR else granularity.scale_shape(spec.shape)
        return Stored(name, "U8" if granularity == MX else "F32", shape)

    def is_tiled(self, granularity: Granularity) -> bool:
        """Return that they are not."""
        return False

    def input_scale(self, name: str) -> Stored:
        """Return `input_scale` []."""
        return Stored(f"{name.removesuffix('.weight')}.input_scale", "F32", ())

    def kv_scale(self, attention: str, kind: Kind, owner: str) -> Stored:
        """Return `k_scale` or `v_scale` [] of the attention."""
        return Stored(f"{attention}.{kind}_scale", "F32", ())

    def markers(self, spec: TensorSpec, storage: Storage, *, is_first: bool) -> tuple[Constant, ...]:
        """Return none."""
        return ()

    def metadata(self, tensors: Sequence[TensorPlan], storage: Storage) -> dict[str, str]:
        """Return nothing."""
        return {}

    @abstractmethod
    def config(self, plan: PackPlan) -> dict[str, Any] | None:
        """See QuantMethod."""

    def files(self, plan: PackPlan) -> dict[str, dict[str, Any]]:
        """Return none: config.json says everything."""
        return {}
