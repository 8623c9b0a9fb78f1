"""The plan, as values: every decision about every tensor. Nothing after it decides by a tensor's name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import prod
from typing import Any, Protocol

from fp8pack.engines.judge import EngineVerdict
from fp8pack.modelfacts.contents import Quantized
from fp8pack.modelfacts.model import ModelFacts
from fp8pack.modelfacts.spec import Stored, TensorSpec
from fp8pack.modelfacts.storage import Storage
from fp8pack.numerics.formats import Float8Format
from fp8pack.numerics.granularity import TENSOR, Granularity
from fp8pack.numerics.rounding import ScaleRounding
from fp8pack.planning.activation_scales import ActivationScale, Kind
from fp8pack.planning.layout import Constant, ShardPlan
from fp8pack.planning.recipe import Recipe
from fp8pack.units import ceil_div


class Action(StrEnum):
    """What happens to a tensor."""

    PACKED = "packed"
    COPIED = "copied"
    UNPACKED = "unpacked"
    CAST = "cast"


@dataclass(frozen=True, slots=True)
class Compensation:
    """The second moments that a weight is rounded with: those of these points of the calibration, added up.

    block: channels of a block. nbytes: of the feedback that is made of them.
    """

    points: tuple[str, ...]
    block: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Packing:
    """How a weight [N, K] is packed; `scale_group` names the tensors that share a tensor-wide scale.

    searched: the scale is the best of several, not that of amax. compensation: None rounds to nearest. carried: the
    payload is passed through from the source, and only scales are converted. tiled: the scales are stored in the order
    of numerics/swizzle.py.
    """

    format: Float8Format
    granularity: Granularity
    rounding: ScaleRounding
    scale: Stored
    scale_group: str
    carried: bool = False
    tiled: bool = False
    searched: bool = False
    compensation: Compensation | None = None

    @property
    def two_pass(self) -> bool:
        """Whether a scale spans bands, so that amax must be known before the first byte is written."""
        return self.granularity == TENSOR and not self.carried


@dataclass(frozen=True, slots=True)
class ExpertPart:
    """A weight of one expert, and where it lies in the fused tensor of the layer; `quantized` is None for a float."""

    spec: TensorSpec
    view: TensorSpec
    quantized: Quantized | None


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """The decision about one tensor, and its bands: the units of work, digest and resume.

    A band has `band_rows` rows and `band_cols` columns of a weight, all columns unless its rows are very long; of
    anything copied, `band_rows` bytes, and of anything cast, elements. `data` is the payload or copy as it is stored;
    `quantized` says how FP8 bytes of the source are dequantized, None if they are floats or are copied. `beside` names
    a weight whose shard it shares. `parts` are the weights that a fused tensor of experts is put together from.
    """

    spec: TensorSpec
    action: Action
    role: str
    reason: str
    data: Stored
    band_rows: int
    band_cols: int = 1
    packing: Packing | None = None
    quantized: Quantized | None = None
    activations: tuple[ActivationScale, ...] = ()
    markers: tuple[Constant, ...] = ()
    beside: str = ""
    parts: tuple[ExpertPart, ...] = ()

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of a weight that is packed or unpacked; bytes and 1 of a copy, elements and 1 of a cast."""
        match self.action:
            case Action.COPIED:
                return self.spec.nbytes, 1
            case Action.CAST:
                return prod(self.spec.shape), 1
            case _:
                return self.spec.matrix

    @property
    def num_bands(self) -> int:
        """Bands that make up the tensor; an empty tensor has none."""
        rows, cols = self.matrix
        return ceil_div(rows, self.band_rows) * ceil_div(cols, self.band_cols)

    @property
    def constants(self) -> tuple[Constant, ...]:
        """Small tensors that are stored with it: activation scales and markers."""
        return (*(Constant(activation.stored, activation.data) for activation in self.activations), *self.markers)


@dataclass(frozen=True, slots=True)
class Plan:
    """How a checkpoint is written: each tensor, each output shard, and the recipe as the manifest stores it.

    recipe_data decides the bytes of a tensor, selection which tensors are quantized.
    """

    facts: ModelFacts
    tensors: tuple[TensorPlan, ...]
    shards: tuple[ShardPlan, ...]
    recipe_data: Mapping[str, Any]
    selection: Mapping[str, Any]
    warnings: tuple[str, ...]

    @property
    def source_nbytes(self) -> int:
        """Bytes of all source tensors."""
        return sum(tensor.spec.nbytes for tensor in self.tensors)

    @property
    def output_nbytes(self) -> int:
        """Bytes of all output tensors."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def packed(self) -> tuple[TensorPlan, ...]:
        """The tensors that are packed."""
        return tuple(tensor for tensor in self.tensors if tensor.action == Action.PACKED)


@dataclass(frozen=True, slots=True)
class PackPlan(Plan):
    """A plan whose output is FP8: its recipe, the engines that load it, the ignored modules, and the targets."""

    recipe: Recipe
    engines: tuple[EngineVerdict, ...]
    ignored_modules: tuple[str, ...]
    targets: tuple[str, ...] = ()
    tp: int | None = None
    ep: int | None = None


class QuantMethod(Protocol):
    """An on-disk convention; `checkpoint/quant_methods/` has one file for each."""

    @property
    def name(self) -> str:
        """The value of `quantization_config.quant_method`, or the name of a convention without one."""
        ...

    @property
    def holds_head_scales(self) -> bool:
        """Whether K and V may have one scale per head."""
        ...

    def expresses(self, storage: Storage) -> bool:
        """Say whether the quant method supports this storage."""
        ...

    def problem(self, shape: tuple[int, ...], granularity: Granularity) -> str | None:
        """Return why no engine reads a weight of this shape in this quant method, None if engines do."""
        ...

    def payload(self, spec: TensorSpec, format: Float8Format) -> Stored:
        """Return name, dtype and shape of the FP8 bytes of a weight."""
        ...

    def scale(self, spec: TensorSpec, granularity: Granularity) -> Stored:
        """Return name, dtype and shape of the scale of a weight."""
        ...

    def is_tiled(self, granularity: Granularity) -> bool:
        """Say whether scales are stored in the tiled order of numerics/swizzle.py."""
        ...

    def input_scale(self, name: str) -> Stored:
        """Return name, dtype and shape of the static input scale of a weight."""
        ...

    def kv_scale(self, attention: str, kind: Kind, owner: str) -> Stored:
        """Return name, dtype and shape of the scale of K or V of an attention; `owner` is the weight that makes it."""
        ...

    def markers(self, spec: TensorSpec, storage: Storage, *, is_first: bool) -> tuple[Constant, ...]:
        """Return the small tensors that declare an FP8 weight; `is_first`: of all."""
        ...

    def metadata(self, tensors: Sequence[TensorPlan], storage: Storage) -> dict[str, str]:
        """Return the free text of every header, about the tensors of all files."""
        ...

    def config(self, plan: PackPlan) -> dict[str, Any] | None:
        """Return the `quantization_config` of a packed checkpoint, None for a convention without one."""
        ...

    def files(self, plan: PackPlan) -> dict[str, dict[str, Any]]:
        """Return the JSON files beside config.json, by name."""
        ...
