"""Reading the scales of FP8 weights, of any convention, as float32 multipliers."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from fp8pack.errors import InputError
from fp8pack.modelfacts.contents import Quantized
from fp8pack.modelfacts.spec import DTYPE_BITS, TensorSpec
from fp8pack.numerics.metrics import widen
from fp8pack.numerics.scaling import decode_e8m0
from fp8pack.numerics.swizzle import TILE, padded, unswizzle
from fp8pack.units import ceil_div

Span = tuple[int, int]
Read = Callable[[TensorSpec, int, int], NDArray[np.uint8]]  # bytes of a tensor: offset and how many


def read_scales(read: Read, spec: TensorSpec, quantized: Quantized, rows: Span, cols: Span) -> NDArray[np.float32]:
    """Return the scales, float32, of the regions that rows and columns of a weight lie in: whole rows of the grid.

    Raises:
        InputError: a scale is negative or not finite.
    """
    grid, region = quantized.granularity.scale_shape(spec.matrix), quantized.granularity.region(spec.matrix)
    if quantized.scale is None:
        return np.ones((1, 1), np.float32)
    top, bottom = rows[0] // region[0], ceil_div(rows[1], region[0])
    scale = quantized.scale
    if quantized.tiled:
        first, width = top // TILE[0] * TILE[0], padded(grid)[1]
        last = min(ceil_div(bottom, TILE[0]) * TILE[0], padded(grid)[0])
        tiles = read(scale, first * width, (last - first) * width).reshape(last - first, width)
        exponents = unswizzle(tiles, (min(last, grid[0]) - first, grid[1]))
        found = decode_e8m0(exponents[top - first : bottom - first])
    else:
        itemsize = DTYPE_BITS[scale.dtype] // 8
        data = read(scale, top * grid[1] * itemsize, (bottom - top) * grid[1] * itemsize)
        found = _decode(data, scale.dtype).reshape(bottom - top, grid[1])
    if not (np.isfinite(found).all() and (found >= 0).all()):
        raise InputError(f"{scale.file}: {scale.name!r} contains a scale that is negative or not finite")
    return np.ascontiguousarray(found[:, cols[0] // region[1] : ceil_div(cols[1], region[1])])


def offset_in_region(spec: TensorSpec, quantized: Quantized, row: int, col: int) -> tuple[int, int]:
    """Return where an element stands in its region."""
    rows, cols = quantized.granularity.region(spec.matrix)
    return row % rows, col % cols


def _decode(data: NDArray[np.uint8], dtype: str) -> NDArray[np.float32]:
    match dtype:
        case "U8" | "F8_E8M0":
            return decode_e8m0(data)
        case "F32":
            return data.view(np.float32)
        case "BF16":
            return widen(data.view(np.uint16), "BF16")
        case _:
            return widen(data.view(np.uint16), "F16")
