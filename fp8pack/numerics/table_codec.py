"""Codes of 4 and 8 bits that stand for values in a table: FP4 (E2M1), INT4, INT8; unpacked and dequantized."""

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fp8pack.numerics.formats import E4M3, TableFormat
from fp8pack.numerics.value_table import value_table

_BYTES = np.arange(256, dtype=np.uint16)
_PAIRS = (_BYTES & 0xF | _BYTES >> 4 << 8).astype("<u2")  # the two nibbles of a byte as two bytes


def split_nibbles(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return two codes for each byte [R, C] -> [R, 2 C], the low nibble first, as in all checkpoints that are read."""
    return _PAIRS[packed].view(np.uint8)


def split_words(words: NDArray[np.uint32], bits: int) -> NDArray[np.uint8]:
    """Return the codes [W * 32 / bits, C] of words [W, C] that are packed along the rows, the lowest bits first.

    Source: compressed-tensors, pack_to_int32 with packed_dim=0, for 4 and 8 bits.
    """
    shifts = np.arange(0, 32, bits, dtype=np.uint32)[:, None]
    codes = words[:, None, :] >> shifts & np.uint32((1 << bits) - 1)
    return codes.astype(np.uint8).reshape(-1, words.shape[1])


def as_e4m3(codes: NDArray[np.uint8], format: TableFormat) -> NDArray[np.uint8]:
    """Return codes of 4 bits as E4M3 bytes of the same values, for the kernels: E4M3 has all of FP4 and INT4."""
    return np.frombuffer(codes.tobytes().translate(_e4m3_bytes(format)), np.uint8).reshape(codes.shape)


@cache
def _e4m3_bytes(format: TableFormat) -> bytes:
    """The E4M3 byte of each code, filled up to 256 for `bytes.translate`."""
    values, positive = value_table(format), value_table(E4M3)[: E4M3.nan_codes[0]]
    magnitudes = np.searchsorted(positive, np.abs(values)) | np.signbit(values) << 7
    return magnitudes.astype(np.uint8).tobytes().ljust(256, b"\0")


def dequantize_codes(  # noqa: PLR0913
    codes: NDArray[np.uint8],
    scales: NDArray[np.float32],
    values: NDArray[Any],
    *,
    format: TableFormat,
    region: tuple[int, int],
    offset: tuple[int, int] = (0, 0),
    zero_points: NDArray[np.float32] | None = None,
) -> float:
    """Fill raw bits of float32 or BF16 with (value of the code - zero point) * scale; return their amax.

    The difference is exact, the product float32, and BF16 is rounded from that to nearest even.
    Shapes: codes and values [N, K]; scales and zero_points: the regions that they lie in, `offset` says where in the
        first one they begin.
    """
    found = value_table(format)[codes]
    if zero_points is not None:
        found -= _spread(zero_points, codes.shape, region, offset)
    with np.errstate(over="ignore"):  # the caller refuses an infinite amax
        found *= _spread(scales, codes.shape, region, offset)
    amax = max(float(found.max(initial=0)), -float(found.min(initial=0)))
    bits = found.view(np.uint32)
    if values.dtype == np.uint16:
        bits += (bits >> 16 & 1) + np.uint32(0x7FFF)
        bits >>= 16
    values[...] = bits
    return amax


def _spread(
    grid: NDArray[np.float32], shape: tuple[int, ...], region: tuple[int, int], offset: tuple[int, int]
) -> NDArray[np.float32]:
    """What each element [N, K] of regions has in a grid; [N, 1] if it is the same in all columns."""
    rows, cols = ((np.arange(shape[axis]) + offset[axis]) // region[axis] for axis in (0, 1))
    return grid[rows] if grid.shape[1] == 1 else grid[rows].take(cols, axis=1)
