"""One band: read it, quantize it, write it, and say what its bytes are.

A band is worked in strips: what is read, quantized, digested and written at a time stays in the processor's cache.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from fp8pack.checkpoint.journal import BandResult
from fp8pack.checkpoint.scales import offset_in_region, read_scales
from fp8pack.checkpoint.source import ShardReader, Source, gather, read_rows
from fp8pack.checkpoint.values import dequantize
from fp8pack.modelfacts.contents import Quantized
from fp8pack.modelfacts.spec import DTYPE_BITS, ELEMENT_BITS, NIBBLE, TensorSpec
from fp8pack.numerics import native
from fp8pack.numerics.compensation import Feedback, compensate, output_energy
from fp8pack.numerics.formats import Float8Format
from fp8pack.numerics.granularity import TENSOR
from fp8pack.numerics.metrics import dequantized, energies, widen
from fp8pack.numerics.narrow import OVERFLOW, cast, narrow
from fp8pack.numerics.scaling import CANDIDATES, better_scales
from fp8pack.numerics.value_table import value_table
from fp8pack.packing.codecs import BITS_DTYPE, Codec
from fp8pack.packing.feedbacks import Feedbacks
from fp8pack.packing.scales import encode_scales, refine
from fp8pack.packing.target import Target, Writer
from fp8pack.planning.plan import ExpertPart, Packing, TensorPlan
from fp8pack.units import ceil_div

SAMPLE_ROWS = 8  # rows of each band whose error is measured
_NAN = np.uint32(0x7FC00000)


@dataclass(frozen=True, slots=True)
class Band:
    """A band of a tensor: rows of a weight that is packed or unpacked, bytes or elements of what is copied or cast."""

    tensor: TensorPlan
    index: int

    @property
    def rows(self) -> tuple[int, int]:
        """First row and the row after the last."""
        begin = self.index // ceil_div(self.tensor.matrix[1], self.tensor.band_cols) * self.tensor.band_rows
        return begin, min(begin + self.tensor.band_rows, self.tensor.matrix[0])

    @property
    def cols(self) -> tuple[int, int]:
        """First column and the column after the last."""
        begin = self.index % ceil_div(self.tensor.matrix[1], self.tensor.band_cols) * self.tensor.band_cols
        return begin, min(begin + self.tensor.band_cols, self.tensor.matrix[1])

    @property
    def nbytes(self) -> int:
        """Bytes of source."""
        (top, bottom), (left, right), (n, k) = self.rows, self.cols, self.tensor.matrix
        return (bottom - top) * (right - left) * self.tensor.spec.nbytes // (n * k)


@dataclass(frozen=True, slots=True)
class OutputPlace:
    """Where a tensor's payload (or copy) and its scales lie in an output file, whose data begins at `data_begin`."""

    file: str
    data_begin: int
    payload: int
    scale: int

    @property
    def payload_begin(self) -> int:
        """The offset of the payload in the file."""
        return self.data_begin + self.payload

    @property
    def scale_begin(self) -> int:
        """The offset of the scales in the file."""
        return self.data_begin + self.scale


class BandWorker:
    """Works bands with buffers and open files of its own; one for each thread."""

    def __init__(self, codec: Codec, source: Source, target: Target, feedbacks: Feedbacks) -> None:
        self._codec, self._feedbacks = codec, feedbacks
        self._source, self._target = source, target
        self._buffers: dict[str, NDArray[np.uint8]] = {}
        self._reader: ShardReader | None = None
        self._writer: Writer | None = None
        self._written = ""

    def amax(self, band: Band) -> float:
        """Return the amax of a band, NaN if it holds a NaN or infinity."""
        found = 0.0
        for lo, hi in self._strips(band):
            weight, dtype = self._read_values(band, lo, hi)
            amax = self._codec.amax(weight, dtype)
            found = amax if math.isnan(amax) else max(found, amax)
            if math.isnan(found):
                break
        return found

    def scale_errors(self, band: Band, packing: Packing, scale: np.float32) -> NDArray[np.float64]:
        """Return what each candidate of a tensor-wide scale costs a band."""
        errors, scales = np.zeros((1, 1, CANDIDATES.size)), np.full((1, 1), scale, np.float32)
        for lo, hi in self._strips(band):
            weight, dtype = self._read_values(band, lo, hi)
            how: dict[str, Any] = {"dtype": dtype, "region": weight.shape, "format": packing.format}
            native.add_scale_errors(weight, scales, errors, factors=CANDIDATES, **how)
        return errors.ravel()

    def copy(self, band: Band, place: OutputPlace) -> BandResult:
        """Copy a band as it is."""
        begin, end = band.rows
        spec, hasher = band.tensor.spec, blake3()
        writer = self._open_writer(place.file)
        for lo in range(begin, end, self._codec.strip_nbytes):
            data = self._read_bytes(spec, lo, min(self._codec.strip_nbytes, end - lo))
            hasher.update(data)
            writer.write(data, place.payload_begin + lo)
        return BandResult(spec.name, band.index, hasher.digest())

    def cast(self, band: Band, place: OutputPlace) -> BandResult:
        """Round a band of floats once; the amax is NaN if a finite value is out of range of the new dtype."""
        spec, dtype = band.tensor.spec, band.tensor.data.dtype
        bits, hasher, writer = BITS_DTYPE[spec.dtype], blake3(), self._open_writer(place.file)
        for lo, hi in self._strips(band):
            data = self._read_bytes(spec, lo * bits.itemsize, (hi - lo) * bits.itemsize)
            rounded = cast(np.frombuffer(data, bits), spec.dtype, dtype)
            if rounded is None:
                return BandResult(spec.name, band.index, b"", amax=math.nan)
            stored = rounded.data.cast("B")
            hasher.update(stored)
            writer.write(stored, place.payload_begin + lo * rounded.itemsize)
        return BandResult(spec.name, band.index, hasher.digest())

    def pack(self, band: Band, packing: Packing, place: OutputPlace, fixed_scale: np.float32) -> BandResult:
        """Quantize a band; `fixed_scale` is the scale of a two-pass packing, ignored otherwise."""
        if packing.compensation is None:
            return self._pack(band, packing, place, fixed_scale, None)
        with self._feedbacks.borrow(packing.compensation) as feedback:
            return self._pack(band, packing, place, fixed_scale, feedback)

    def _pack(
        self, band: Band, packing: Packing, place: OutputPlace, fixed_scale: np.float32, feedback: Feedback | None
    ) -> BandResult:
        spec = band.tensor.spec
        begin, region_rows = band.rows[0], packing.granularity.region(spec.shape)[0]
        hasher, amax, measured = blake3(), 0.0, np.zeros(4)
        scales, writer = self._scales(band, packing, fixed_scale), self._open_writer(place.file)
        for lo, hi in self._strips(band):
            weight, dtype = self._read_values(band, lo, hi)
            payload = np.frombuffer(self._buffer("payload", weight.size), np.uint8).reshape(weight.shape)
            first = 0 if packing.two_pass else (lo - begin) // region_rows
            part = scales[first : first + ceil_div(hi - lo, region_rows)]
            found = self._codec.quantize(weight, payload, part, dtype=dtype, packing=packing)
            amax = found if math.isnan(found) else max(amax, found)
            if math.isnan(amax):
                return BandResult(spec.name, band.index, b"", amax=amax)
            region = packing.granularity.region(weight.shape)
            if packing.searched and not packing.two_pass:
                _search_scales(weight, payload, part, dtype=dtype, region=region, format=packing.format)
            if feedback is not None:
                compensate(weight, payload, part, feedback, dtype=dtype, region=region, format=packing.format)
            if (sampled := begin + SAMPLE_ROWS - lo) > 0:
                rows, regions = slice(sampled), slice(ceil_div(sampled, region_rows))
                exact = widen(weight[rows], dtype)
                rounded = dequantized(payload[rows], part[regions], region=region, format=packing.format)
                measured[:2] += energies(exact, rounded)
                if feedback is not None:
                    measured[2:] += output_energy(exact, feedback), output_energy(exact - rounded, feedback)
            data = payload.data.cast("B")
            hasher.update(data)
            _move(writer.write, data, band, itemsize=1, begin=place.payload_begin, lo=lo)
        scale_digest = self._write_scales(band, packing, place, scales)
        return BandResult(spec.name, band.index, hasher.digest(), scale_digest, amax, *measured.tolist())

    def carry(self, band: Band, packing: Packing, place: OutputPlace) -> BandResult:
        """Write the FP8 bytes of a band as they are, and their scales under the convention's name and shape."""
        spec, quantized = band.tensor.spec, _quantized(band)
        hasher, amax, writer = blake3(), 0.0, self._open_writer(place.file)
        for lo, hi in self._strips(band):
            payload = self._read(band, lo, hi)
            found = self._amax_of_codes(band, payload, lo, packing.format)
            amax = found if math.isnan(found) else max(amax, found)
            if math.isnan(amax):
                return BandResult(spec.name, band.index, b"", amax=amax)
            data = payload.data.cast("B")
            hasher.update(data)
            _move(writer.write, data, band, itemsize=1, begin=place.payload_begin, lo=lo)
        coarse = read_scales(self._read_rows, spec, quantized, band.rows, band.cols)
        scales = refine(coarse, spec, quantized, packing, rows=band.rows, cols=band.cols)
        scale_digest = self._write_scales(band, packing, place, scales)
        return BandResult(spec.name, band.index, hasher.digest(), scale_digest, amax)

    def unpack(self, band: Band, place: OutputPlace) -> BandResult:
        """Dequantize a band: the product in float32, rounded once."""
        spec, dtype = band.tensor.spec, band.tensor.data.dtype
        itemsize = DTYPE_BITS[dtype] // 8
        hasher, amax, writer = blake3(), 0.0, self._open_writer(place.file)
        bits, width = np.dtype(np.uint16 if dtype == "BF16" else np.uint32), band.cols[1] - band.cols[0]
        for lo, hi in [band.rows] if band.tensor.parts else self._strips(band):
            data = self._buffer("values", (hi - lo) * width * bits.itemsize)
            weight = np.frombuffer(data, bits).reshape(hi - lo, width)
            if band.tensor.parts:
                found = self._join(band, weight)
            else:
                payload = self._read(band, lo, hi)
                found = dequantize(self._read_rows, spec, _quantized(band), payload, weight, (lo, band.cols[0]))
            amax = found if math.isnan(found) else max(amax, found)
            if not amax < OVERFLOW[dtype]:
                return BandResult(spec.name, band.index, b"", amax=math.nan)
            stored = narrow(weight.view(np.float32), dtype) if dtype == "F16" else weight
            data = stored.data.cast("B")
            hasher.update(data)
            _move(writer.write, data, band, itemsize=itemsize, begin=place.payload_begin, lo=lo)
        return BandResult(spec.name, band.index, hasher.digest(), amax=amax)

    def _join(self, band: Band, rows: NDArray[Any]) -> float:
        """Fill a band of a fused tensor of experts, as bits, from the weights of each; return their amax.

        A weight lies in it with its rows as rows, or transposed; gate and up may take turns along its last dimension.
        """
        (begin, end), (height, width), amax = band.rows, band.tensor.matrix, 0.0
        count, parts = band.tensor.spec.shape[0], band.tensor.parts
        each, of_expert = len(parts) // count, height // count
        for part in parts[begin // of_expert * each : ceil_div(end, of_expert) * each]:
            n, k = part.spec.matrix if len(part.spec.shape) > 1 else (1, part.spec.shape[0])
            strides = part.view.strides or (k, 1)
            first, left = divmod(part.view.begin // (DTYPE_BITS[part.view.dtype] // 8), width)
            transposed = len(part.spec.shape) > 1 and strides[0] < strides[1]
            top, bottom = max(begin, first), min(end, first + (k if transposed else n))
            if top >= bottom:
                continue
            span = (top - first, bottom - first)
            block, found = self._block(part, ((0, n), span) if transposed else (span, (0, k)), rows.dtype)
            amax = found if math.isnan(found) else max(amax, found)
            step = strides[0] if transposed else strides[1]
            target = rows[
                top - begin : bottom - begin, left : left + (block.shape[0] if transposed else k) * step : step
            ]
            target[:] = block.T if transposed else block
        return amax

    def _block(
        self, part: ExpertPart, where: tuple[tuple[int, int], tuple[int, int]], bits: np.dtype[Any]
    ) -> tuple[NDArray[Any], float]:
        """Rows and columns of a weight as raw bits of BF16 or float32, and their amax."""
        spec, ((top, bottom), (left, right)) = part.spec, where
        data = np.empty((bottom - top, right - left), BITS_DTYPE.get(spec.dtype, np.dtype(np.uint8)))
        gather(self._open_reader(spec.file), spec, data, (top, left))
        if part.quantized is None:
            return data if bits.itemsize == data.itemsize else widen(data, spec.dtype).view(np.uint32), 0.0
        values = np.empty(data.shape, bits)
        return values, dequantize(self._read_rows, spec, part.quantized, data, values, (top, left))

    def close(self) -> None:
        """Close the files."""
        for opened in (self._reader, self._writer):
            if opened is not None:
                opened.close()

    def _open_reader(self, file: str) -> ShardReader:
        if self._reader is None or self._reader.path.name != file:
            if self._reader is not None:
                self._reader.close()
            self._reader = self._source.open_file(file)
        return self._reader

    def _open_writer(self, file: str) -> Writer:
        if self._writer is None or self._written != file:
            if self._writer is not None:
                self._writer.close()
            self._writer, self._written = self._target.open(file), file
        return self._writer

    def _scales(self, band: Band, packing: Packing, fixed_scale: np.float32) -> NDArray[np.float32]:
        if packing.two_pass:
            return np.full((1, 1), fixed_scale, np.float32)
        (top, bottom), (left, right) = band.rows, band.cols
        return np.empty(packing.granularity.scale_shape((bottom - top, right - left)), np.float32)

    def _write_scales(self, band: Band, packing: Packing, place: OutputPlace, scales: NDArray[np.float32]) -> bytes:
        """Write the band's part of the scales, which is contiguous: whole rows of them, or a part of one row."""
        if packing.granularity == TENSOR and band.index > 0:
            return b""
        stored = encode_scales(scales, packing)
        data = stored.data.cast("B")
        shape = band.tensor.spec.shape
        region_rows, region_cols = packing.granularity.region(shape)
        width = packing.scale.shape[1] if packing.tiled else packing.granularity.scale_shape(shape)[1]
        first = band.rows[0] // region_rows * width + band.cols[0] // region_cols
        self._open_writer(place.file).write(data, place.scale_begin + first * stored.itemsize)
        return blake3(data).digest()

    def _strips(self, band: Band) -> Iterator[tuple[int, int]]:
        """Rows that are worked at a time: of a quantized weight fewer, since they grow to float32."""
        packing, (begin, end) = band.tensor.packing, band.rows
        granule = (packing.granularity.rows or 1) if packing else 1
        row_nbytes = 4 * (band.cols[1] - band.cols[0]) if band.tensor.quantized else band.nbytes // (end - begin)
        limit = self._codec.strip_nbytes * (4 if band.tensor.spec.strides else 1)  # longer lines of what is transposed
        rows = granule * max(1, limit // (granule * row_nbytes))
        for lo in range(begin, end, rows):
            yield lo, min(lo + rows, end)

    def _read_values(self, band: Band, lo: int, hi: int) -> tuple[NDArray[Any], str]:
        """Rows of a weight as raw bits of a float dtype: those of a quantized one become float32."""
        data, spec, quantized = self._read(band, lo, hi), band.tensor.spec, band.tensor.quantized
        if quantized is None:
            return data, spec.dtype
        values = np.frombuffer(self._buffer("values", 4 * data.size), np.uint32).reshape(data.shape)
        if math.isnan(dequantize(self._read_rows, spec, quantized, data, values, (lo, band.cols[0]))):
            values[0, 0] = _NAN
        return values, "F32"

    def _amax_of_codes(self, band: Band, payload: NDArray[np.uint8], lo: int, format: Float8Format) -> float:
        """Return the amax of FP8 rows from `lo` on, NaN if they hold a NaN or infinity."""
        spec, quantized = band.tensor.spec, _quantized(band)
        scales = read_scales(self._read_rows, spec, quantized, (lo, lo + payload.shape[0]), band.cols)
        region, offset = quantized.granularity.region(spec.matrix), offset_in_region(spec, quantized, lo, band.cols[0])
        largest = native.largest_codes(payload, scales.shape, region=region, offset=offset)
        if largest.max() >= format.nan_codes[0]:
            return math.nan
        return float((value_table(format)[largest] * scales).max())

    def _read(self, band: Band, lo: int, hi: int) -> NDArray[Any]:
        """Rows of a weight as they lie in the source: raw bits of floats, FP8 bytes, or codes, a byte each."""
        spec, dtype = band.tensor.spec, BITS_DTYPE.get(band.tensor.spec.dtype, np.dtype(np.uint8))
        left, right = band.cols
        data = self._buffer("source", (hi - lo) * (right - left) * dtype.itemsize)
        weight = np.frombuffer(data, dtype).reshape(hi - lo, right - left)
        if spec.strides is not None or ELEMENT_BITS[spec.dtype] == NIBBLE:
            gather(self._open_reader(spec.file), spec, weight, (lo, left))
        else:
            _move(self._open_reader(spec.file).readinto, data, band, itemsize=dtype.itemsize, begin=spec.begin, lo=lo)
        return weight

    def _read_rows(self, spec: TensorSpec, lo: int, hi: int) -> NDArray[Any]:
        return read_rows(self._open_reader(spec.file), spec, lo, hi)

    def _read_bytes(self, spec: TensorSpec, offset: int, nbytes: int) -> memoryview:
        """Bytes of a tensor, as if they were one range."""
        data = self._buffer("source", nbytes)
        if spec.strides is None:
            self._open_reader(spec.file).readinto(data, spec.begin + offset)
        else:
            self._gather_bytes(spec, data, offset)
        return data

    def _gather_bytes(self, spec: TensorSpec, data: memoryview, offset: int) -> None:
        """Bytes of a part of a fused tensor that is kept, from an offset on: whole rows are gathered and cut."""
        itemsize, cols = DTYPE_BITS[spec.dtype] // 8, spec.matrix[1]
        first, last = offset // (cols * itemsize), ceil_div(offset + len(data), cols * itemsize)
        rows = np.empty((last - first, cols), np.dtype(f"u{itemsize}"))
        gather(self._open_reader(spec.file), spec, rows, (first, 0))
        begin = offset - first * cols * itemsize
        data[:] = rows.data.cast("B")[begin : begin + len(data)]

    def _buffer(self, name: str, nbytes: int) -> memoryview:
        if name not in self._buffers or self._buffers[name].size < nbytes:
            self._buffers[name] = np.empty(nbytes, np.uint8)
        return self._buffers[name][:nbytes].data


def _search_scales(
    weight: NDArray[Any],
    payload: NDArray[np.uint8],
    scales: NDArray[np.float32],
    *,
    dtype: str,
    region: tuple[int, int],
    format: Float8Format,
) -> None:
    """Replace scales by better ones, and the payload by that of rounding to nearest with them."""
    errors = np.zeros((*scales.shape, CANDIDATES.size))
    native.add_scale_errors(weight, scales, errors, factors=CANDIDATES, dtype=dtype, region=region, format=format)
    scales[...] = better_scales(scales, errors)
    native.quantize_rows(weight, payload, scales, dtype=dtype, region=region, format=format, rounding=None)


def _quantized(band: Band) -> Quantized:
    if band.tensor.quantized is None:
        raise ValueError(f"{band.tensor.spec.name} is not quantized")
    return band.tensor.quantized


def _move(
    transfer: Callable[[memoryview, int], None], data: memoryview, band: Band, *, itemsize: int, begin: int, lo: int
) -> None:
    """Read or write the rows of a band from row `lo` on, of a matrix that begins at this offset of the file."""
    (left, right), row_nbytes = band.cols, band.tensor.matrix[1] * itemsize
    width = (right - left) * itemsize
    if width == row_nbytes:
        transfer(data, begin + lo * row_nbytes)
        return
    for i in range(len(data) // width):
        transfer(data[i * width : (i + 1) * width], begin + (lo + i) * row_nbytes + left * itemsize)
