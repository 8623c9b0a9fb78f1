"""A packed weight on a device."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fp8pack.numerics import torch_codec


@dataclass(frozen=True, slots=True, eq=False)
class PackedTensor:
    """An FP8 weight [N, K] and the scales that dequantize it.

    data: [N, K], float8_e4m3fn or float8_e5m2, row-major. scale: as stored, float32 with the granularity's grid, [] for
    a whole tensor, or uint8 E8M0 exponents for mx; `multiplier` is the same number in float32.
    block: the region (R, C) that shares one scale. input_scale: the activation's static multiplier, None if dynamic.
    """

    name: str
    data: Tensor
    scale: Tensor
    format: str
    granularity: str
    block: tuple[int, int]
    source_dtype: torch.dtype
    input_scale: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """[N, K]."""
        return self.data.shape

    @property
    def multiplier(self) -> Tensor:
        """The scales as float32 [ceil(N/R), ceil(K/C)]: value = data * multiplier."""
        grid = (-(-self.shape[0] // self.block[0]), -(-self.shape[1] // self.block[1]))
        if self.scale.dtype == torch.uint8:
            return self.scale.view(torch.float8_e8m0fnu).float().reshape(grid)
        return self.scale.reshape(grid)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weight [N, K], by default in the dtype it had before packing.

        The product is taken in float32 and rounded once.
        """
        return torch_codec.dequantize(self.data, self.multiplier, self.block).to(dtype or self.source_dtype)
