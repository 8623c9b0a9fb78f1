"""The tensors of a checkpoint, the same for every quant method: weights under their own names, and their scales."""

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
    """How an FP8 tensor is dequantized: value = fp8 * scale.

    granularity: the region that shares a scale; all dimensions but the last count as rows.
    scale: F32, BF16 or F16, or exponents (U8, F8_E8M0) of powers of two; None if there is no scale.
    tiled: the scales are stored in the order of numerics/swizzle.py. input_scale: of the input activations, if static.
    source_dtype: of the floats before quantization; BF16 if unknown.
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

    method: the quant method that is declared, empty if there is none. tensors: everything but scales and markers, FP8
    weights under the names that they have in BF16. quantized: how each FP8 weight is dequantized. kv_scales: scales of
    K and V by point (`….self_attn.k`). other_scales: scales of other activations, such as Q. unread: weights in a
    format that fp8pack does not read, such as FP4. ignored: the ignored modules, as the configuration lists them.
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
    ignored: tuple[str, ...] = ()

    @property
    def storage(self) -> Storage | None:
        """How most of its FP8 weights are stored; None if there are none."""
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
        """The dtype of most of its FP8 weights before quantization."""
        dtypes = Counter(quantized.source_dtype for quantized in self.quantized.values())
        return dtypes.most_common(1)[0][0] if dtypes else "BF16"
