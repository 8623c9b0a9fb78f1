"""The tensors of a checkpoint, the same for every quant method: weights under their own names, and their scales."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches

from fp8pack.errors import InputError
from fp8pack.modelfacts.model import ModelFacts
from fp8pack.modelfacts.spec import TensorSpec
from fp8pack.modelfacts.storage import Storage
from fp8pack.numerics.formats import Float8Format, Format
from fp8pack.numerics.granularity import Granularity


@dataclass(frozen=True, slots=True)
class Quantized:
    """How a quantized tensor is dequantized: value = (element - zero point) * scale.

    format: FP8, or FP4, INT4 and INT8 of other checkpoints.
    granularity: the region that shares a scale; all dimensions but the last count as rows.
    scale: F32, BF16 or F16, or exponents (U8, F8_E8M0) of powers of two; None if there is no scale.
    tiled: the scales are stored in the order of numerics/swizzle.py. input_scale: of the input activations, if static.
    source_dtype: of the floats before quantization; BF16 if unknown.
    global_scale: F32, a second level, by which every scale (then F8_E4M3) is multiplied, or divided if `divides`.
    zero_point: I8 in the grid of the scales, or such codes packed along the rows in I32; None if it is 0.
    """

    format: Format
    granularity: Granularity
    scale: TensorSpec | None
    tiled: bool = False
    input_scale: TensorSpec | None = None
    source_dtype: str = "BF16"
    global_scale: TensorSpec | None = None
    divides: bool = False
    zero_point: TensorSpec | None = None

    @property
    def kind(self) -> str:
        """FP8, FP4, INT4 or INT8."""
        return "FP8" if isinstance(self.format, Float8Format) else self.format.kind

    @property
    def has_exponents(self) -> bool:
        """Whether the scales are stored as exponents."""
        return self.scale is not None and self.scale.dtype in ("U8", "F8_E8M0")


@dataclass(frozen=True, slots=True)
class Contents:
    """The tensors of a checkpoint.

    method: the quant method that is declared, empty if there is none. tensors: everything but scales and markers,
    quantized weights under the names and with the shapes that they have in BF16. quantized: how each of them is
    dequantized. kv_scales: scales of K and V by point (`….self_attn.k`). other_scales: scales of other activations,
    such as Q. unread: weights in a format that fp8pack does not read, such as GPTQ's. ignored: the ignored modules, as
    the configuration lists them.
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
        found = Counter(
            (quantized.format, quantized.granularity)
            for quantized in (self.quantized[spec.name] for spec in self.tensors if spec.name in self.quantized)
            if isinstance(quantized.format, Float8Format)
        )
        if not found:
            return None
        (format, granularity), _ = found.most_common(1)[0]
        return Storage(
            self.method,
            format,
            granularity,
            self.activations,
            self.powers_of_two,
            bool(self.kv_scales),
            self.spelling,
        )

    def no_such_tensor(self, place: object, name: str) -> InputError:
        """Return the error of a tensor that is not there, with the nearest names."""
        near = get_close_matches(name, [spec.name for spec in self.tensors], 3)
        guess = f": did you mean {' or '.join(map(repr, near))}?" if near else ""
        return InputError(f"{place} has no tensor {name!r}{guess}")

    @property
    def source_dtype(self) -> str:
        """The dtype of most of its quantized weights before quantization."""
        dtypes = Counter(quantized.source_dtype for quantized in self.quantized.values())
        return dtypes.most_common(1)[0][0] if dtypes else "BF16"
