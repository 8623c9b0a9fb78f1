"""One band: read it, quantize it, write it, and say what its bytes are.

A band is worked in strips: what is read, quantized, digested and written at a time stays in the processor's cache.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from fp8pack.checkpoint.journal import BandResult
from fp8pack.checkpoint.shard_writer import ShardWriter
from fp8pack.checkpoint.source import ShardReader
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
        begin = self.index * self.tensor.band_rows
        return begin, min(begin + self.tensor.band_rows, self.tensor.num_rows)

    @property
    def nbytes(self) -> int:
        """Bytes of source."""
        begin, end = self.rows
        return (end - begin) * (self.tensor.spec.nbytes // self.tensor.num_rows)


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
        k = spec.shape[1]
        begin, region_rows = band.rows[0], packing.granularity.region(spec.shape)[0]
        hasher, amax, energies = blake3(), 0.0, (0.0, 0.0)
        scales, writer = self._scales(band, packing, fixed_scale), self._open_writer(place.file)
        for lo, hi in self._strips(band):
            weight = self._read(band, lo, hi)
            payload = np.frombuffer(self._buffer("payload", (hi - lo) * k), np.uint8).reshape(hi - lo, k)
            first = 0 if packing.two_pass else (lo - begin) // region_rows
            part = scales[first : first + ceil_div(hi - lo, region_rows)]
            found = self._codec.quantize(weight, payload, part, dtype=spec.dtype, packing=packing)
            amax = found if math.isnan(found) else max(amax, found)
            if math.isnan(amax):
                return BandResult(spec.name, band.index, "", amax=amax)
            if lo == begin:
                rows, regions = slice(SAMPLE_ROWS), slice(ceil_div(SAMPLE_ROWS, region_rows))
                energies = self._codec.error(
                    weight[rows], payload[rows], part[regions], dtype=spec.dtype, packing=packing
                )
            hasher.update(payload.data)
            writer.write(payload.data.cast("B"), place.payload_begin + lo * k)
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
        begin, end = band.rows
        return np.empty(packing.granularity.scale_shape((end - begin, band.tensor.spec.shape[1])), np.float32)

    def _write_scales(self, band: Band, packing: Packing, place: Place, scales: NDArray[np.float32]) -> str:
        if packing.two_pass and band.index > 0:
            return ""
        stored: NDArray[Any] = encode_e8m0(scales) if packing.scale.dtype == "U8" else scales
        data = stored.data.cast("B")
        first = band.rows[0] // packing.granularity.region(band.tensor.spec.shape)[0]
        self._open_writer(place.file).write(data, place.scale_begin + first * stored.shape[1] * stored.itemsize)
        return blake3(data).hexdigest()

    def _strips(self, band: Band) -> Iterator[tuple[int, int]]:
        packing, spec = band.tensor.packing, band.tensor.spec
        granule = (packing.granularity.rows or 1) if packing else 1
        granule_nbytes = granule * spec.nbytes // spec.shape[0]
        rows = granule * max(1, self._codec.strip_nbytes // granule_nbytes)
        begin, end = band.rows
        for lo in range(begin, end, rows):
            yield lo, min(lo + rows, end)

    def _read(self, band: Band, lo: int, hi: int) -> NDArray[Any]:
        spec = band.tensor.spec
        row_nbytes = spec.nbytes // spec.shape[0]
        data = self._buffer("source", (hi - lo) * row_nbytes)
        self._open_reader(spec.file).readinto(data, spec.begin + lo * row_nbytes)
        return np.frombuffer(data, BITS_DTYPE[spec.dtype]).reshape(hi - lo, spec.shape[1])

    def _buffer(self, name: str, nbytes: int) -> memoryview:
        if name not in self._buffers or self._buffers[name].size < nbytes:
            self._buffers[name] = np.empty(nbytes, np.uint8)
        return self._buffers[name][:nbytes].data
