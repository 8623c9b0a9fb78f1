"""Scales in the layouts of kernels.

Sources: cuBLAS documentation, cublasLtMatmulMatrixScale_t and the 1-D block scaling factors layout; DeepGEMM,
deep_gemm/utils/layout and its tests.
"""

import torch
from torch import Tensor

from fp8pack.numerics.granularity import BLOCK_128, CHANNEL, MX, TENSOR, Granularity
from fp8pack.numerics.swizzle import padded
from fp8pack.units import round_up


def for_cublaslt(scale: Tensor, granularity: Granularity, shape: tuple[int, int]) -> Tensor:
    """Return the scales of a weight in the layout of cuBLASLt and torch's scaled_mm.

    scale: [ceil(N/R), ceil(K/C)] float32; shape: [N, K], padded or not. The result, by granularity: tensor [1];
        channel [1, N]; block:128x128 [round_up(ceil(K/128), 4), ceil(N/128)], K contiguous; mx exponents of
        round_up(N, 128) x round_up(ceil(K/32), 4) in tiles, float8_e8m0fnu, flat. Padding is zero.
    Raises:
        ValueError: cuBLASLt does not support this granularity.
    """
    rows, cols = shape
    if granularity == TENSOR:
        return scale.reshape(1)
    if granularity == CHANNEL:
        return pad(scale.reshape(1, -1), 1, rows)
    if granularity == BLOCK_128:
        return pad(scale, scale.shape[0], round_up(scale.shape[1], 4)).t()
    if granularity == MX:
        return tile(pad(exponents_of(scale), rows, -(-cols // 32))).view(torch.float8_e8m0fnu).reshape(-1)
    raise ValueError(f"cuBLASLt does not support {granularity} scales")


def for_deepgemm(scale: Tensor, n: int, region_rows: int) -> Tensor:
    """Return the scales of a weight in DeepGEMM's layout for SM100; on SM90 it reads `scale` unchanged.

    scale: [ceil(N/R), G] float32, powers of two. The result: [N, ceil(G/4)] int32, each with four exponents along K,
        the first in the lowest byte; N contiguous, columns round_up(N, 4) apart.
    Raises:
        ValueError: a scale is not a power of two; pack with `scale_rounding="up"`.
    """
    exponents = exponents_of(scale).repeat_interleave(region_rows, 0)[:n]
    words = pad(exponents, round_up(n, 4), round_up(exponents.shape[1], 4)).view(torch.int32)
    return words.t().contiguous().t()[:n]


def exponents_of(scale: Tensor) -> Tensor:
    """Return the E8M0 bytes of scales, float32 powers of two; ValueError for any other."""
    bits = scale.contiguous().view(torch.int32)
    subnormal = bits == 1 << 22  # 2^-127, whose byte is 0
    if not (((bits & 0x7FFFFF) == 0) | subnormal).all():
        raise ValueError("a scale is not a power of two, which this kernel needs: pack with scale_rounding='up'")
    return (bits >> 23).to(torch.uint8)


def tile(exponents: Tensor) -> Tensor:
    """Return exponents [R, C], uint8, in the tiles of numerics/swizzle.py, as [R', C']."""
    rows, cols = padded((exponents.shape[0], exponents.shape[1]))
    tiles = pad(exponents, rows, cols).reshape(rows // 128, 4, 32, cols // 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(rows, cols).contiguous()


def untile(tiles: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the exponents [R, C] of tiles, uint8."""
    rows, cols = padded(grid)
    exponents = tiles.reshape(rows // 128, cols // 4, 32, 4, 4).permute(0, 3, 2, 1, 4).reshape(rows, cols)
    return exponents[: grid[0], : grid[1]].contiguous()


def pad(matrix: Tensor, rows: int, cols: int) -> Tensor:
    """Return a matrix of any dtype, FP8 included, padded with zeros to this shape; itself if nothing changes."""
    if tuple(matrix.shape) == (rows, cols):
        return matrix.contiguous()
    wide = torch.zeros((rows, cols), dtype=matrix.dtype, device=matrix.device)
    wide[: matrix.shape[0], : matrix.shape[1]].copy_(matrix)
    return wide
