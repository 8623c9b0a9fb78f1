"""Second moments X^T X of activations X [T, K]: in B blocks of S channels, float64, stored as upper triangles."""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from fp8pack.units import ceil_div

BLOCK: Final = 128  # channels of a block: the diagonal blocks of K channels take 128 / K of the whole


def block_of(kind: str, channels: int) -> int:
    """Return the channels of a block: of kind `none` 0, `blocks` at most 128, `full` all."""
    return {"none": 0, "blocks": min(BLOCK, channels), "full": channels}[kind]


def triangles_shape(channels: int, block: int) -> tuple[int, int]:
    """Return the shape [B, S * (S + 1) / 2] of the triangles of these channels."""
    return ceil_div(channels, block), block * (block + 1) // 2


def triangles_of(moments: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the upper triangles of moments [B, S, S], row after row: [B, S * (S + 1) / 2]."""
    count, size, _ = moments.shape
    triangles, begin = np.empty((count, size * (size + 1) // 2)), 0
    for i in range(size):
        triangles[:, begin : begin + size - i] = moments[:, i, i:]
        begin += size - i
    return triangles


def matrices_of(triangles: NDArray[np.float64], block: int) -> NDArray[np.float64]:
    """Return moments [B, S, S] from their upper triangles; zeros below the diagonal."""
    moments, begin = np.zeros((triangles.shape[0], block, block)), 0
    for i in range(block):
        moments[:, i, i:] = triangles[:, begin : begin + block - i]
        begin += block - i
    return moments


def diagonal_of(triangles: NDArray[np.float64], channels: int, block: int) -> NDArray[np.float64]:
    """Return the diagonal of the moments of these channels: [K]."""
    rows = np.arange(block)
    return triangles[:, rows * block - rows * (rows - 1) // 2].ravel()[:channels]
