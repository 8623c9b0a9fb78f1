"""A weight in every format and granularity, quantized and dequantized strip by strip."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fp8pack.checkpoint.values import ValueReader, strips
from fp8pack.errors import InputError
from fp8pack.modelfacts.spec import TensorSpec
from fp8pack.numerics import native
from fp8pack.numerics.formats import FORMATS, Float8Format
from fp8pack.numerics.granularity import BLOCK_128, CHANNEL, MX, TENSOR, Granularity, parse_granularity
from fp8pack.numerics.rounding import ScaleRounding
from fp8pack.numerics.scaling import scale_of

_ROWS = 128  # of a strip: whole regions of every granularity


@dataclass(frozen=True, slots=True)
class Case:
    """A format and a granularity."""

    format: Float8Format
    granularity: Granularity

    def __str__(self) -> str:
        return f"{self.format.name} {self.granularity.name}"

    def nbytes(self, shape: tuple[int, int]) -> int:
        """Return the bytes of a weight with its scales: a byte each for mx, else float32."""
        rows, cols = self.granularity.scale_shape(shape)
        return shape[0] * shape[1] + rows * cols * (1 if self.granularity is MX else 4)


CASES = tuple(
    Case(format, granularity)
    for format in FORMATS
    for granularity in (TENSOR, CHANNEL, parse_granularity("group:128"), BLOCK_128, MX)
)
Rounded = tuple[NDArray[np.float32], NDArray[np.uint8]]  # values and codes


def quantized_strips(reader: ValueReader, spec: TensorSpec) -> Iterator[tuple[NDArray[Any], dict[Case, Rounded]]]:
    """Yield strips of a float weight as raw bits, and as what each case makes of them.

    Raises:
        InputError: the weight has a NaN or infinity.
    """
    amax = max((native.amax_rows(reader.bits(spec, lo, hi), dtype=spec.dtype) for lo, hi in strips(spec)), default=0.0)
    if not np.isfinite(amax):
        raise InputError(f"{spec.file}: {spec.name!r} has a NaN or infinity, and cannot be quantized")
    rows = spec.matrix[0]
    for lo in range(0, rows, _ROWS):
        bits = reader.bits(spec, lo, min(lo + _ROWS, rows))
        yield bits, {case: _round_trip(bits, spec.dtype, case, amax) for case in CASES}


def _round_trip(bits: NDArray[Any], dtype: str, case: Case, amax: float) -> Rounded:
    payload, values = np.empty(bits.shape, np.uint8), np.empty(bits.shape, np.uint32)
    rounding = ScaleRounding.UP if case.granularity is MX else ScaleRounding.NONE
    region, fixed = case.granularity.region(bits.shape), case.granularity is TENSOR
    scales = np.empty(case.granularity.scale_shape(bits.shape), np.float32)
    if fixed:
        scales[:] = scale_of(amax, case.format, rounding)
    native.quantize_rows(
        *(bits, payload, scales),
        dtype=dtype,
        region=region,
        format=case.format,
        rounding=None if fixed else rounding,
    )
    native.dequantize_rows(payload, scales, values, region=region, format=case.format)
    return values.view(np.float32), payload
