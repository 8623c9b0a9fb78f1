"""The digests of a packed checkpoint: which bytes are digested together, and what they must come to.

A tensor's digest is BLAKE3 over the BLAKE3 digests of its bands, in order; docs/format.md says what a band is.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from fp8pack.checkpoint.manifest import digest_of_bands
from fp8pack.checkpoint.manifest_schema import (
    ActivationEntry,
    Entry,
    PackedEntry,
    StoredEntry,
    UnpackedEntry,
)
from fp8pack.errors import VerificationError
from fp8pack.modelfacts.spec import DTYPE_BITS, TensorSpec
from fp8pack.numerics.granularity import TENSOR, parse_granularity
from fp8pack.numerics.swizzle import padded
from fp8pack.planning.sizes import SIZES


@dataclass(frozen=True, slots=True)
class Crop:
    """Columns of rows: the bytes of a row, and the first byte and the one after the last."""

    row: int
    left: int
    right: int

    def of(self, data: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return the columns of whole rows, a view [rows, right - left]."""
        return data.reshape(-1, self.row)[:, self.left : self.right]


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes of a tensor that are read together: one band, or of very long rows the bands beside each other."""

    begin: int
    nbytes: int
    crops: tuple[Crop, ...] = ()

    def digests(self, data: NDArray[np.uint8]) -> list[bytes]:
        """Return the digest of each band."""
        bands = [np.ascontiguousarray(crop.of(data)) for crop in self.crops] or [data]
        return [blake3(band.data).digest() for band in bands]


@dataclass(frozen=True, slots=True)
class Expected:
    """What the digests of a tensor's pieces must come to."""

    spec: TensorSpec
    pieces: tuple[Piece, ...]
    digest: str
    of_bands: bool = True  # else a small tensor, digested as it is

    def check(self, digests: list[bytes]) -> None:
        """Raise VerificationError unless these digests of the bands, in order, are the expected ones."""
        found = digest_of_bands(digests) if self.of_bands else f"blake3:{digests[0].hex()}"
        if found != self.digest:
            raise VerificationError(
                f"{self.spec.file}: the bytes of {self.spec.name!r} are not those that were packed",
                "copy the file again",
            )


def expected_digests(tensors: Mapping[str, Entry], specs: Mapping[str, TensorSpec]) -> dict[str, Expected]:
    """Return what the entries of a manifest say of each tensor that the files hold, by its name in the files."""
    found: dict[str, Expected] = {}
    for name, entry in tensors.items():
        small: list[ActivationEntry | StoredEntry] = list(entry.activation_scales)
        match entry:
            case PackedEntry():
                payload, scale = specs[entry.tensor or name], specs[entry.scale_inv.tensor]
                found[payload.name] = Expected(payload, tuple(_rows(payload, entry)), entry.digest)
                found[scale.name] = Expected(scale, tuple(_scale_pieces(entry, scale)), entry.scale_inv.digest)
                small += entry.markers
            case UnpackedEntry():
                found[name] = Expected(specs[name], tuple(_rows(specs[name], entry)), entry.digest)
            case _:
                size = specs[name].nbytes
                lengths = [min(SIZES.band, size - at) for at in range(0, size, SIZES.band)]
                found[name] = Expected(specs[name], tuple(_consecutive(lengths)), entry.digest)
        for stored in small:
            spec = specs[stored.tensor]
            found[stored.tensor] = Expected(spec, (Piece(0, spec.nbytes),), stored.digest, of_bands=False)
    return found


def _rows(spec: TensorSpec, entry: PackedEntry | UnpackedEntry) -> Iterator[Piece]:
    """The rows of each band of a weight, or of the bands beside each other."""
    (n, k), itemsize = spec.matrix, DTYPE_BITS[spec.dtype] // 8
    width, row = entry.band_cols or k, k * itemsize
    crops = [Crop(row, left * itemsize, min(left + width, k) * itemsize) for left in range(0, k, max(1, width))]
    for top in range(0, n if k else 0, entry.band_rows):
        rows = min(entry.band_rows, n - top)
        yield Piece(top * row, rows * row, tuple(crops) if len(crops) > 1 else ())


def _scale_pieces(entry: PackedEntry, scale: TensorSpec) -> Iterator[Piece]:
    """The scales of each band, which follow each other."""
    granularity, (n, k) = parse_granularity(entry.granularity), entry.shape
    if granularity == TENSOR:
        return iter([Piece(0, scale.nbytes)])
    itemsize, width = DTYPE_BITS[scale.dtype] // 8, entry.band_cols or k
    lengths = []
    for top in range(0, n, entry.band_rows):
        for left in range(0, k, width):
            grid = granularity.scale_shape((min(entry.band_rows, n - top), min(width, k - left)))
            lengths.append(prod(grid if entry.scale_inv.layout is None else padded(grid)) * itemsize)
    return _consecutive(lengths)


def _consecutive(lengths: list[int]) -> Iterator[Piece]:
    begin = 0
    for nbytes in lengths:
        yield Piece(begin, nbytes)
        begin += nbytes
