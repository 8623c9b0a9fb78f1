"""Reading the scales of quantized weights, of any convention, as float32 multipliers, and their zero points."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fp8pack.errors import InputError
from fp8pack.modelfacts.contents import Quantized
from fp8pack.modelfacts.spec import TensorSpec
from fp8pack.numerics.formats import E4M3, TableFormat
from fp8pack.numerics.metrics import widen
from fp8pack.numerics.scaling import decode_e8m0
from fp8pack.numerics.swizzle import TILE, padded, unswizzle
from fp8pack.numerics.table_codec import split_words
from fp8pack.numerics.value_table import value_table
from fp8pack.units import ceil_div

Span = tuple[int, int]
Read = Callable[[TensorSpec, int, int], NDArray[Any]]  # rows of a tensor, as `read_rows` returns them
_WORD = 32  # bits


def read_scales(read: Read, spec: TensorSpec, quantized: Quantized, rows: Span, cols: Span) -> NDArray[np.float32]:
    """Return the scales, float32, of the regions that rows and columns of a weight lie in: whole rows of the grid.

    Raises:
        InputError: a scale is negative or not finite.
    """
    found = read_any_scales(read, spec, quantized, rows, cols)
    if quantized.scale is not None and num_bad(found):
        file, name = quantized.scale.file, quantized.scale.name
        raise InputError(f"{file}: {name!r} contains a scale that is negative or not finite")
    return found


def num_bad(scales: NDArray[np.float32]) -> int:
    """Return how many scales are negative or not finite."""
    return scales.size - int(np.count_nonzero(np.isfinite(scales) & (scales >= 0)))


def read_any_scales(read: Read, spec: TensorSpec, quantized: Quantized, rows: Span, cols: Span) -> NDArray[np.float32]:
    """Return what `read_scales` does, whatever the scales are."""
    grid, region = quantized.granularity.scale_shape(spec.matrix), quantized.granularity.region(spec.matrix)
    if quantized.scale is None:
        return np.ones((1, 1), np.float32)
    top, bottom = rows[0] // region[0], ceil_div(rows[1], region[0])
    scale = quantized.scale
    if quantized.tiled:
        first = top // TILE[0] * TILE[0]
        last = min(ceil_div(bottom, TILE[0]) * TILE[0], padded(grid)[0])
        tiles = read(replace(scale, shape=padded(grid)), first, last)
        exponents = unswizzle(tiles, (min(last, grid[0]) - first, grid[1]))
        found = decode_e8m0(exponents[top - first : bottom - first])
    else:
        found = _decode(read(_in_grid(scale, grid), top, bottom), scale.dtype)
    if quantized.global_scale is not None:
        second = _decode(read(_in_grid(quantized.global_scale, (1, 1)), 0, 1), "F32")
        with np.errstate(all="ignore"):
            found = found / second if quantized.divides else found * second
    return np.ascontiguousarray(found[:, cols[0] // region[1] : ceil_div(cols[1], region[1])])


def read_zero_points(
    read: Read, spec: TensorSpec, quantized: Quantized, rows: Span, cols: Span
) -> NDArray[np.float32] | None:
    """Return the zero points of the regions that `read_scales` returns the scales of; None if they are 0."""
    stored, format = quantized.zero_point, quantized.format
    if stored is None or not isinstance(format, TableFormat):
        return None
    grid, region = quantized.granularity.scale_shape(spec.matrix), quantized.granularity.region(spec.matrix)
    top, bottom = rows[0] // region[0], ceil_div(rows[1], region[0])
    if stored.dtype == "I8":
        found: NDArray[np.float32] = read(_in_grid(stored, grid), top, bottom).view(np.int8).astype(np.float32)
    else:
        count = _WORD // format.bits
        words = read(stored, top // count, ceil_div(bottom, count))
        codes = split_words(words, format.bits)[top % count :][: bottom - top]
        found = value_table(format)[codes]
    return np.ascontiguousarray(found[:, cols[0] // region[1] : ceil_div(cols[1], region[1])])


def offset_in_region(spec: TensorSpec, quantized: Quantized, row: int, col: int) -> tuple[int, int]:
    """Return where an element stands in its region."""
    rows, cols = quantized.granularity.region(spec.matrix)
    return row % rows, col % cols


def _in_grid(scale: TensorSpec, grid: tuple[int, int]) -> TensorSpec:
    """Scales as a matrix, whatever dimensions of 1 they are stored with; those with gaps are one already."""
    return scale if scale.strides else replace(scale, shape=grid)


def _decode(data: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    match dtype:
        case "F8_E4M3":
            return np.asarray(value_table(E4M3)[data])
        case "U8" | "F8_E8M0":
            return decode_e8m0(data)
        case "F32":
            return np.asarray(data.view(np.float32))
        case "BF16":
            return widen(data, "BF16")
        case _:
            return widen(data, "F16")
