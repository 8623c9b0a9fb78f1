"""A packed weight on a device."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fp8pack.numerics import torch_codec
from fp8pack.numerics.swizzle import padded


@dataclass(frozen=True, slots=True, eq=False)
class PackedTensor:
    """An FP8 weight [N, K] and the scales that dequantize it.

    data: [N, K], float8_e4m3fn or float8_e5m2, row-major. scale: as stored, in whatever shape the convention has: a
    float, or exponents of powers of two, uint8 or float8_e8m0fnu, which lie in cuBLASLt's tiles if `tiled`;
    `multiplier` is the same number in float32. block: the region (R, C) that shares one scale.
    input_scale: the activation's static multiplier, None if dynamic. name, shape: a fused weight [E, N, K] of foreign
    checkpoints counts as [E N, K] where regions are concerned.
    """

    name: str
    data: Tensor
    scale: Tensor
    format: str
    granularity: str
    block: tuple[int, int]
    source_dtype: torch.dtype
    input_scale: Tensor | None = None
    tiled: bool = False

    @property
    def shape(self) -> torch.Size:
        """[N, K]."""
        return self.data.shape

    @property
    def multiplier(self) -> Tensor:
        """The scales as float32 [ceil(N/R), ceil(K/C)]: value = data * multiplier."""
        n, k = self.data.reshape(-1, self.shape[-1]).shape
        grid = (-(-n // self.block[0]), -(-k // self.block[1]))
        scale = self.scale
        if self.tiled:
            rows, cols = padded(grid)
            tiles = scale.view(torch.uint8).reshape(rows // 128, cols // 4, 32, 4, 4).permute(0, 3, 2, 1, 4)
            scale = tiles.reshape(rows, cols)[: grid[0], : grid[1]].contiguous()
        if scale.dtype == torch.uint8:
            scale = scale.view(torch.float8_e8m0fnu)
        return scale.float().reshape(grid)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weight, by default in the dtype it had before packing.

        The product is taken in float32 and rounded once.
        """
        dtype = dtype or self.source_dtype
        if not self.data.numel():
            return torch.empty(self.shape, dtype=dtype, device=self.data.device)
        rows = self.data.reshape(-1, self.shape[-1])
        return torch_codec.dequantize(rows, self.multiplier, self.block).reshape(self.shape).to(dtype)
