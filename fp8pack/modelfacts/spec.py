"""A tensor as its safetensors header describes it."""

from dataclasses import dataclass
from math import prod

from fp8pack.units import ceil_div

DTYPE_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
}
ELEMENT_BITS = DTYPE_BITS | {"I4": 4}  # INT4, for which safetensors has no dtype: it lies in words
NIBBLE = 4  # bits
FLOAT_DTYPES = ("BF16", "F16", "F32")
TORCH_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}  # as torch spells them, and safetensors


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor of a checkpoint: `begin` and `end` are byte offsets in its file, `dtype` as safetensors names it.

    A part of a fused tensor is a spec of its own: `part_of` is the fused tensor, `end` is the offset after its last
    element, and `strides` are those of its rows and columns, in elements, if its bytes are not one range; the matrices
    of a 3-D tensor follow each other. A weight that is packed, such as FP4, has its own shape and dtype F4 or I4.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    begin: int
    end: int
    part_of: "TensorSpec | None" = None
    strides: tuple[int, int] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return ceil_div(ELEMENT_BITS[self.dtype] * prod(self.shape), 8) if self.strides else self.end - self.begin

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns, with all dimensions but the last as rows."""
        return prod(self.shape[:-1]), self.shape[-1] if self.shape else 1


@dataclass(frozen=True, slots=True)
class Stored:
    """Name, dtype and shape of an output tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return nbytes_of(self.dtype, self.shape)


def nbytes_of(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the bytes of a tensor; ValueError when a sub-byte dtype does not fill whole bytes."""
    bits = DTYPE_BITS[dtype] * prod(shape)
    if bits % 8:
        raise ValueError(f"{prod(shape)} elements of {dtype} do not fill whole bytes")
    return bits // 8
