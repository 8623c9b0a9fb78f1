"""The tiled order of MX scales that cuBLASLt reads, SWIZZLE_32_4_4: 128 rows x 4 columns make 512 contiguous bytes.

offset(r, c) = ((r // 128) * (C' / 4) + c // 4) * 512 + (r % 32) * 16 + (r % 128) // 32 * 4 + c % 4, where R' x C' is
the grid padded with zeros to multiples of 128 and 4. Source: cuBLAS documentation, 1D block scaling factors layout.
"""

import numpy as np
from numpy.typing import NDArray

from fp8pack.units import ceil_div

TILE = (128, 4)


def padded(grid: tuple[int, int]) -> tuple[int, int]:
    """Return the shape of a grid of scales as it is stored in tiles."""
    return ceil_div(grid[0], TILE[0]) * TILE[0], ceil_div(grid[1], TILE[1]) * TILE[1]


def swizzle(scales: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return scales [R, C] in tiles, as [R', C']."""
    rows, cols = padded(scales.shape)
    grid = np.zeros((rows, cols), np.uint8)
    grid[: scales.shape[0], : scales.shape[1]] = scales
    tiles = grid.reshape(rows // 128, 4, 32, cols // 4, 4).transpose(0, 3, 2, 1, 4)
    return np.ascontiguousarray(tiles).reshape(rows, cols)


def unswizzle(tiles: NDArray[np.uint8], grid: tuple[int, int]) -> NDArray[np.uint8]:
    """Return the scales [R, C] of tiles [R', C']."""
    rows, cols = padded(grid)
    scales = tiles.reshape(rows // 128, cols // 4, 32, 4, 4).transpose(0, 3, 2, 1, 4).reshape(rows, cols)
    return np.ascontiguousarray(scales[: grid[0], : grid[1]])
