"""What most conventions have in common; each file of this room says what one of them does otherwise."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from fp8pack.modelfacts.spec import Stored, TensorSpec
from fp8pack.modelfacts.storage import Storage
from fp8pack.numerics.formats import Float8Format
from fp8pack.numerics.granularity import MX, TENSOR, Granularity
from fp8pack.planning.activation_scales import Kind
from fp8pack.planning.layout import Constant
from fp8pack.planning.plan import PackPlan, TensorPlan
from fp8pack.planning.shapes import shape_problem


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
        """Return why a weight stays, see `shape_problem`."""
        return shape_problem(shape, granularity)

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
