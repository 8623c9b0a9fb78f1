"""Element types, as facts: the two of FP8, and those of other checkpoints that are only read."""

from dataclasses import dataclass

from fp8pack.inputs import unknown


@dataclass(frozen=True, slots=True)
class Float8Format:
    """An FP8 element type.

    `max` is the largest finite magnitude, `emax` its binary exponent, `bias` the exponent bias.
    Source: OCP 8-bit Floating Point Specification 1.0; tests/numerics/test_formats.py checks each value.
    """

    name: str
    dtype: str  # in a safetensors header
    torch_dtype: str
    mantissa_bits: int
    bias: int
    max: float
    emax: int

    @property
    def nan_codes(self) -> tuple[int, ...]:
        """The bytes, without their sign, that are no finite numbers: NaN, of e5m2 infinity too."""
        return (0x7F,) if self.mantissa_bits == 3 else (0x7C, 0x7D, 0x7E, 0x7F)


E4M3 = Float8Format("e4m3", "F8_E4M3", "float8_e4m3fn", mantissa_bits=3, bias=7, max=448.0, emax=8)
E5M2 = Float8Format("e5m2", "F8_E5M2", "float8_e5m2", mantissa_bits=2, bias=15, max=57344.0, emax=15)
FORMATS = (E4M3, E5M2)


@dataclass(frozen=True, slots=True)
class TableFormat:
    """An element type that is read and never written: the value of each code, of 4 or 8 bits.

    kind: what it is called beside FP8 and BF16.
    """

    name: str
    kind: str
    bits: int
    values: tuple[float, ...]


_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1 = TableFormat("e2m1", "FP4", 4, (*_E2M1, *(-value for value in _E2M1)))  # OCP Microscaling Formats 1.0, 5.3.3
INT4 = TableFormat("int4", "INT4", 4, tuple(range(-8, 8)))  # plus 8, as compressed-tensors packs: pack_to_int32
INT8 = TableFormat("int8", "INT8", 8, tuple(range(-128, 128)))  # plus 128, packed likewise
SIGNED_INT8 = TableFormat("int8", "INT8", 8, (*range(128), *range(-128, 0)))  # two's complement
TABLE_FORMATS = (E2M1, INT4, INT8)
Format = Float8Format | TableFormat


def parse_format(text: str) -> Float8Format:
    """Return the format of a name such as `e4m3`, `E4M3`, `fp8_e4m3` or `float8_e4m3fn`."""
    name = text.lower().replace("-", "_").removeprefix("fp8_").removeprefix("float8_").removesuffix("fn")
    for candidate in FORMATS:
        if candidate.name == name:
            return candidate
    raise unknown("format", text, tuple(format.name for format in FORMATS))
