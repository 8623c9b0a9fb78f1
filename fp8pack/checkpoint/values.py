"""The values of a checkpoint's tensors, row by row, in float32: floats as they are, others times their scales."""

from collections.abc import Iterator
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fp8pack.checkpoint.scales import Read, Span, offset_in_region, read_any_scales, read_scales, read_zero_points
from fp8pack.checkpoint.source import ShardReader, Source, read_rows
from fp8pack.errors import InputError
from fp8pack.modelfacts.contents import Contents, Quantized
from fp8pack.modelfacts.spec import NIBBLE, TensorSpec
from fp8pack.numerics import native
from fp8pack.numerics.formats import E4M3, TableFormat
from fp8pack.numerics.metrics import widen
from fp8pack.numerics.table_codec import as_e4m3, dequantize_codes
from fp8pack.regular_files import FewOpen

_STRIP_NBYTES = 4 << 20
_BITS = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32}


def strips(spec: TensorSpec) -> Iterator[tuple[int, int]]:
    """Yield ranges of rows, a few MiB of float32 each."""
    rows, cols = spec.matrix
    step = max(1, _STRIP_NBYTES // (4 * max(cols, 1)))
    return ((lo, min(lo + step, rows)) for lo in range(0, rows, step))


def dequantize(
    read: Read, spec: TensorSpec, quantized: Quantized, payload: NDArray[np.uint8], values: NDArray[Any], at: Span
) -> float:
    """Fill raw bits [rows, cols] of float32 or BF16 with what codes mean; return their amax, NaN if one is a NaN.

    read: rows of the scales. payload: FP8 bytes, or codes of 4 or 8 bits, a byte each. at: the row and column of the
    tensor where the payload begins.
    """
    rows, cols = ((begin, begin + length) for begin, length in zip(at, payload.shape, strict=True))
    scales, format = read_scales(read, spec, quantized, rows, cols), quantized.format
    region, offset = quantized.granularity.region(spec.matrix), offset_in_region(spec, quantized, *at)
    if isinstance(format, TableFormat) and format.bits == NIBBLE and quantized.zero_point is None:
        payload, format = as_e4m3(payload, format), E4M3
    if not isinstance(format, TableFormat):
        return native.dequantize_rows(payload, scales, values, region=region, format=format, offset=offset)
    zero_points = read_zero_points(read, spec, quantized, rows, cols)
    return dequantize_codes(
        payload, scales, values, format=format, region=region, offset=offset, zero_points=zero_points
    )


class ValueReader:
    """Reads rows of tensors; a context manager that keeps a few files open. One for each thread."""

    def __init__(self, source: Source, contents: Contents) -> None:
        self._source, self._quantized = source, contents.quantized
        self._readers: FewOpen[ShardReader] = FewOpen()

    def __enter__(self) -> "ValueReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._readers.close()

    def values(self, spec: TensorSpec, lo: int, hi: int) -> NDArray[np.float32]:
        """Return rows of a tensor as float32 [hi - lo, K]; a NaN byte is a NaN.

        Raises:
            InputError: it is neither quantized nor BF16, FP16 or FP32, or a scale is negative or not finite.
        """
        quantized = self._quantized.get(spec.name)
        if quantized is None:
            if spec.dtype not in _BITS:
                raise InputError(f"{spec.file}: {spec.name!r} is {spec.dtype}, which has no numeric values")
            return widen(self.bits(spec, lo, hi), spec.dtype)
        return self.dequantized(spec, lo, hi)[0]

    def dequantized(self, spec: TensorSpec, lo: int, hi: int) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """Return rows of a quantized tensor as float32 [hi - lo, K], and the codes behind them; raises as `values`."""
        quantized, payload = self._quantized[spec.name], self.bits(spec, lo, hi)
        values = np.empty(payload.shape, np.uint32)
        amax = dequantize(self.bits, spec, quantized, payload, values, (lo, 0))
        found = values.view(np.float32)
        if np.isnan(amax) and not isinstance(quantized.format, TableFormat):
            found[np.isin(payload & 0x7F, quantized.format.nan_codes)] = np.nan
        return found, payload

    def bits(self, spec: TensorSpec, lo: int, hi: int) -> NDArray[Any]:
        """Return rows of a tensor as they are stored, see `read_rows`."""
        return read_rows(self._open(spec.file), spec, lo, hi)

    def scales(self, spec: TensorSpec) -> NDArray[np.float32]:
        """Return every scale of a quantized tensor, float32, in its grid, whatever it is."""
        rows, cols = spec.matrix
        return read_any_scales(self.bits, spec, self._quantized[spec.name], (0, rows), (0, cols))

    def _open(self, file: str) -> ShardReader:
        return self._readers.get(file, self._source.open_file)
