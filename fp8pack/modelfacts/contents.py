"""What a checkpoint means, whatever its convention: tensors under their own names, and how FP8 bytes become values."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from fp8pack.modelfacts.model import ModelFacts
from fp8pack.modelfacts.spec import TensorSpec
from fp8pack.modelfacts.storage import Storage
from fp8pack.numerics.formats import Float8Format
from fp8pack.numerics.granularity import Granularity


@dataclass(frozen=True, slots=True)
class Quantized:
    """How the bytes of an FP8 tensor become values: value = fp8 * scale.

    granularity: the region that shares a scale, of a tensor whose dimensions but the last are taken as rows.
    scale: F32, BF16 or F16, or exponents (U8, F8_E8M0) of powers of two; None where the bytes are the values.
    tiled: the scales lie in the order of numerics/swizzle.py. input_scale: of what enters the weight, if static.
    source_dtype: of the floats that it was packed from; BF16 where nothing says it.
    """

    format: Float8Format
    granularity: Granularity
    scale: TensorSpec | None
    tiled: bool = False
    input_scale: TensorSpec | None = None
    source_dtype: str = "BF16"

    @property
    def has_exponents(self) -> bool:
        """Whether the scales are stored as exponents."""
        return self.scale is not None and self.scale.dtype in ("U8", "F8_E8M0")


@dataclass(frozen=True, slots=True)
class Contents:
    """The tensors of a checkpoint.

    method: the convention that announces itself, empty if none does. tensors: everything but scales and markers, FP8
    weights under the name that they have in every other convention. quantized: of the FP8 ones. kv_scales: the
    multipliers of K and V by point (`….self_attn.k`). other_scales: tensors that are scales of other activations, such
    as Q. unread: weights that are packed in a way that fp8pack does not read, such as FP4. kept: the modules that stay,
    as the configuration lists them.
    """

    method: str
    tensors: tuple[TensorSpec, ...]
    facts: ModelFacts
    quantized: Mapping[str, Quantized] = field(default_factory=dict)
    kv_scales: Mapping[str, TensorSpec] = field(default_factory=dict)
    other_scales: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    activations: str = "dynamic"
    spelling: str = ""
    powers_of_two: bool = False
    kept: tuple[str, ...] = ()

    @property
    def storage(self) -> Storage | None:
        """How most of its FP8 weights are stored; None if it holds none."""
        if not self.quantized:
            return None
        (format, granularity), _ = Counter(
            (quantized.format, quantized.granularity)
            for quantized in (self.quantized[spec.name] for spec in self.tensors if spec.name in self.quantized)
        ).most_common(1)[0]
        return Storage(
            self.method,
            format,
            granularity,
            self.activations,
            self.powers_of_two,
            bool(self.kv_scales),
            self.spelling,
        )

    @property
    def source_dtype(self) -> str:
        """The dtype that most of its FP8 weights were packed from."""
        dtypes = Counter(quantized.source_dtype for quantized in self.quantized.values())
        return dtypes.most_common(1)[0][0] if dtypes else "BF16"
