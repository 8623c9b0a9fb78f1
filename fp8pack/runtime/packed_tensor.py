"""A packed weight on a device."""

from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Literal

import torch
from torch import Tensor

from fp8pack.errors import InputError
from fp8pack.gemm.layouts import for_cublaslt, for_deepgemm, untile
from fp8pack.gemm.make_operand import make_operand
from fp8pack.gemm.operand import Operand
from fp8pack.numerics import torch_codec
from fp8pack.numerics.formats import parse_format
from fp8pack.numerics.granularity import parse_granularity
from fp8pack.units import ceil_div


@dataclass(frozen=True, eq=False, repr=False)
class PackedTensor:
    """An FP8 weight [N, K] and the scales that dequantize it: `qdata.float() * expand_scale()` is the weight.

    qdata: [N, K], float8_e4m3fn or float8_e5m2, row-major. stored_scale: in the dtype and shape of the file: floats, or
    exponents of powers of two, uint8 or float8_e8m0fnu, in cuBLASLt's tiles if `tiled`; `scale` is the same in float32.
    block: the region (R, C) that shares one scale.
    input_scale: the activation's static multiplier, None if dynamic. weight_only: activations are not quantized.
    name, shape: a fused weight [E, N, K] of another tool has the scale regions of [E N, K].
    """

    name: str
    qdata: Tensor
    stored_scale: Tensor
    format: str
    granularity: str
    block: tuple[int, int]
    source_dtype: torch.dtype
    input_scale: Tensor | None = None
    tiled: bool = False
    weight_only: bool = False

    def __repr__(self) -> str:
        return (
            f"PackedTensor({self.name!r}, shape={list(self.shape)}, format={self.format!r}, "
            f"granularity={self.granularity!r}, block={self.block}, scale={list(_grid(self._matrix, self.block))}, "
            f"device='{self.qdata.device}')"
        )

    @property
    def shape(self) -> torch.Size:
        """[N, K]."""
        return self.qdata.shape

    @cached_property
    def scale(self) -> Tensor:
        """The multiplier of each region, float32 [ceil(N/R), ceil(K/C)], for every stored dtype and layout."""
        return self._float_scale()

    def expand_scale(self) -> Tensor:
        """Return the multiplier of each element: float32, in the shape of the weight."""
        n, k = self._matrix
        rows, cols = (torch.arange(size, device=self.qdata.device) for size in (n, k))
        by_row = self._float_scale().index_select(0, rows // self.block[0])
        return by_row.index_select(1, cols // self.block[1]).reshape(self.shape)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weight, by default in the dtype it had before packing.

        `qdata.float() * expand_scale()`: multiplied in float32, rounded once.
        """
        dtype = dtype or self.source_dtype
        if not self.qdata.numel():
            return torch.empty(self.shape, dtype=dtype, device=self.qdata.device)
        rows = self.qdata.reshape(self._matrix)
        return torch_codec.dequantize(rows, self._float_scale(), self.block).reshape(self.shape).to(dtype)

    def scale_for(self, kernel: Literal["cublaslt", "deepgemm"]) -> Tensor:
        """Return the scales in a kernel's layout (docs/gemm.md), for GEMMs of your own; `linear` does not need it.

        Raises:
            ValueError: the kernel does not support this granularity, or only scales that are powers of two.
        """
        if kernel == "cublaslt":
            return for_cublaslt(self._float_scale(), parse_granularity(self.granularity), self._matrix)
        return for_deepgemm(self._float_scale(), self._matrix[0], self.block[0])

    @cached_property
    def operand(self) -> Operand:
        """The weight, padded and with its scales in the layout of its device's GEMM; made once, at the first use."""
        return make_operand(
            self.qdata.reshape(self._matrix),
            self._float_scale(),
            parse_format(self.format),
            parse_granularity(self.granularity),
            input_scale=self.input_scale,
            weight_only=self.weight_only,
        )

    @property
    def _matrix(self) -> tuple[int, int]:
        """Rows and columns, with all dimensions but the last as rows."""
        return prod(self.shape[:-1]), prod(self.shape[-1:])

    def _float_scale(self) -> Tensor:
        """`scale`, not cached: it has four times the bytes of stored exponents.

        Raises:
            InputError: one is negative or not finite; on a CPU only, since another device would have to be waited for.
        """
        scale = grid_of(self.stored_scale, self._matrix, self.block, tiled=self.tiled)
        scale = (scale.view(torch.float8_e8m0fnu) if scale.dtype == torch.uint8 else scale).float()
        if scale.device.type == "cpu" and not ((scale >= 0) & scale.isfinite()).all():
            raise InputError(f"{self.name!r} has a scale that is negative or not finite", "`fp8pack verify` says more")
        return scale


def grid_of(stored: Tensor, shape: tuple[int, int], block: tuple[int, int], *, tiled: bool) -> Tensor:
    """Return stored scales of a weight [N, K] as [ceil(N/R), ceil(K/C)], in their dtype."""
    grid = _grid(shape, block)
    if 0 in grid:  # an empty weight, which may have one scale
        return stored.reshape(-1)[:0].reshape(grid)
    return untile(stored.view(torch.uint8), grid) if tiled else stored.reshape(grid)


def _grid(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    return ceil_div(shape[0], block[0]), ceil_div(shape[1], block[1])
