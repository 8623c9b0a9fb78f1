"""One band: read it, quantize it, write it, and say what its bytes are.

A band is worked in strips: what is read, quantized, digested and written at a time stays in the processor's cache.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from fp8pack.checkpoint.journal import BandResult
from fp8pack.checkpoint.shard_writer import ShardWriter
from fp8pack.checkpoint.source import ShardReader
from fp8pack.numerics.metrics import error_energy
from fp8pack.numerics.scaling import encode_e8m0
from fp8pack.packing.codecs import BITS_DTYPE, Codec
from fp8pack.planning.plan import Packing, TensorPlan
from fp8pack.units import ceil_div

SAMPLE_ROWS = 8  # rows of each band whose error is measured


@dataclass(frozen=True, slots=True)
class Band:
    """A band of a tensor: rows of a packed weight, bytes of anything copied."""

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
        return (bottom - top) * (right - left) * (self.tensor.spec.nbytes // (n * k))


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor's payload (or copy) and its scales begin in an output file."""

    file: str
    payload_begin: int
    scale_begin: int


class BandWorker:
    """Works bands with buffers and open files of its own; one for each thread."""

    def __init__(self, codec: Codec, source: Path, output: Path) -> None:
        self._codec = codec
        self._source, self._output = source, output
        self._buffers: dict[str, NDArray[np.uint8]] = {}
        self._reader: ShardReader | None = None
        self._writer: ShardWriter | None = None

    def amax(self, band: Band) -> float:
        """Return the amax of a band, NaN if it holds a NaN or infinity."""
        spec = band.tensor.spec
        found = 0.0
        for lo, hi in self._strips(band):
            amax = self._codec.amax(self._read(band, lo, hi), spec.dtype)
            found = amax if math.isnan(amax) else max(found, amax)
            if math.isnan(found):
                break
        return found

    def copy(self, band: Band, place: Place) -> BandResult:
        """Copy a band as it is."""
        begin, end = band.rows
        hasher = blake3()
        reader, writer = self._open_reader(band.tensor.spec.file), self._open_writer(place.file)
        for lo in range(begin, end, self._codec.strip_nbytes):
            data = self._buffer("source", min(self._codec.strip_nbytes, end - lo))
            reader.readinto(data, band.tensor.spec.begin + lo)
            hasher.update(data)
            writer.write(data, place.payload_begin + lo)
        return BandResult(band.tensor.spec.name, band.index, hasher.hexdigest())

    def pack(self, band: Band, packing: Packing, place: Place, fixed_scale: np.float32) -> BandResult:
        """Quantize a band; `fixed_scale` is the scale of a two-pass packing, ignored otherwise."""
        spec = band.tensor.spec
        begin, region_rows = band.rows[0], packing.granularity.region(spec.shape)[0]
        hasher, amax, energies = blake3(), 0.0, (0.0, 0.0)
        scales, writer = self._scales(band, packing, fixed_scale), self._open_writer(place.file)
        for lo, hi in self._strips(band):
            weight = self._read(band, lo, hi)
            payload = np.frombuffer(self._buffer("payload", weight.size), np.uint8).reshape(weight.shape)
            first = 0 if packing.two_pass else (lo - begin) // region_rows
            part = scales[first : first + ceil_div(hi - lo, region_rows)]
            found = self._codec.quantize(weight, payload, part, dtype=spec.dtype, packing=packing)
            amax = found if math.isnan(found) else max(amax, found)
            if math.isnan(amax):
                return BandResult(spec.name, band.index, "", amax=amax)
            if lo == begin:
                rows, regions = slice(SAMPLE_ROWS), slice(ceil_div(SAMPLE_ROWS, region_rows))
                energies = error_energy(
                    *(weight[rows], payload[rows], part[regions]),
                    dtype=spec.dtype,
                    region=packing.granularity.region(weight.shape),
                    format=packing.format,
                )
            data = payload.data.cast("B")
            hasher.update(data)
            _move(writer.write, data, band, itemsize=1, begin=place.payload_begin, lo=lo)
        scale_digest = self._write_scales(band, packing, place, scales)
        return BandResult(spec.name, band.index, hasher.hexdigest(), scale_digest, amax, *energies)

    def close(self) -> None:
        """Close the files."""
        for opened in (self._reader, self._writer):
            if opened is not None:
                opened.close()

    def _open_reader(self, file: str) -> ShardReader:
        path = self._source / file
        if self._reader is None or self._reader.path != path:
            if self._reader is not None:
                self._reader.close()
            self._reader = ShardReader(path)
        return self._reader

    def _open_writer(self, file: str) -> ShardWriter:
        path = self._output / file
        if self._writer is None or self._writer.path != path:
            if self._writer is not None:
                self._writer.close()
            self._writer = ShardWriter(path)
        return self._writer

    def _scales(self, band: Band, packing: Packing, fixed_scale: np.float32) -> NDArray[np.float32]:
        if packing.two_pass:
            return np.full((1, 1), fixed_scale, np.float32)
        (top, bottom), (left, right) = band.rows, band.cols
        return np.empty(packing.granularity.scale_shape((bottom - top, right - left)), np.float32)

    def _write_scales(self, band: Band, packing: Packing, place: Place, scales: NDArray[np.float32]) -> str:
        """Write the band's part of the scales, which is contiguous: whole rows of them, or a part of one row."""
        if packing.two_pass and band.index > 0:
            return ""
        stored: NDArray[Any] = encode_e8m0(scales) if packing.scale.dtype == "U8" else scales
        data = stored.data.cast("B")
        shape = band.tensor.spec.shape
        region_rows, region_cols = packing.granularity.region(shape)
        first = band.rows[0] // region_rows * packing.granularity.scale_shape(shape)[1] + band.cols[0] // region_cols
        self._open_writer(place.file).write(data, place.scale_begin + first * stored.itemsize)
        return blake3(data).hexdigest()

    def _strips(self, band: Band) -> Iterator[tuple[int, int]]:
        packing = band.tensor.packing
        granule = (packing.granularity.rows or 1) if packing else 1
        (begin, end), row_nbytes = band.rows, band.nbytes // (band.rows[1] - band.rows[0])
        rows = granule * max(1, self._codec.strip_nbytes // (granule * row_nbytes))
        for lo in range(begin, end, rows):
            yield lo, min(lo + rows, end)

    def _read(self, band: Band, lo: int, hi: int) -> NDArray[Any]:
        spec, dtype = band.tensor.spec, BITS_DTYPE[band.tensor.spec.dtype]
        width = band.cols[1] - band.cols[0]
        data = self._buffer("source", (hi - lo) * width * dtype.itemsize)
        _move(self._open_reader(spec.file).readinto, data, band, itemsize=dtype.itemsize, begin=spec.begin, lo=lo)
        return np.frombuffer(data, dtype).reshape(hi - lo, width)

    def _buffer(self, name: str, nbytes: int) -> memoryview:
        if name not in self._buffers or self._buffers[name].size < nbytes:
            self._buffers[name] = np.empty(nbytes, np.uint8)
        return self._buffers[name][:nbytes].data


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
