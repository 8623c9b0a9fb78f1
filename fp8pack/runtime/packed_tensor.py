"""A packed weight on a device."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from fp8pack.gemm.layouts import for_cublaslt, for_deepgemm, untile
from fp8pack.gemm.make_operand import make_operand
from fp8pack.gemm.operand import Operand
from fp8pack.numerics import torch_codec
from fp8pack.numerics.formats import parse_format
from fp8pack.numerics.granularity import parse_granularity


@dataclass(frozen=True, eq=False)
class PackedTensor:
    """An FP8 weight [N, K] and the scales that dequantize it.

    data: [N, K], float8_e4m3fn or float8_e5m2, row-major. scale: as stored, in whatever shape the convention has: a
    float, or exponents of powers of two, uint8 or float8_e8m0fnu, which lie in cuBLASLt's tiles if `tiled`;
    `multiplier` is the same number in float32. block: the region (R, C) that shares one scale.
    input_scale: the activation's static multiplier, None if dynamic. weight_only: activations are not quantized.
    name, shape: a fused weight [E, N, K] of foreign checkpoints counts as [E N, K] where regions are concerned.
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
    weight_only: bool = False

    @property
    def shape(self) -> torch.Size:
        """[N, K]."""
        return self.data.shape

    @property
    def multiplier(self) -> Tensor:
        """The scales as float32 [ceil(N/R), ceil(K/C)]: value = data * multiplier."""
        n, k = self.data.reshape(-1, self.shape[-1]).shape
        scale = grid_of(self.scale, (n, k), self.block, tiled=self.tiled)
        if scale.dtype == torch.uint8:
            scale = scale.view(torch.float8_e8m0fnu)
        return scale.float()

    @cached_property
    def operand(self) -> Operand:
        """The weight as a GEMM of its device takes it: padded, its scales laid out; made once, when first asked for."""
        return make_operand(
            self.data.reshape(-1, self.shape[-1]),
            self.multiplier,
            parse_format(self.format),
            parse_granularity(self.granularity),
            input_scale=self.input_scale,
            weight_only=self.weight_only,
        )

    def scale_for(self, kernel: Literal["cublaslt", "deepgemm"]) -> Tensor:
        """Return the scales as a kernel of one's own reads them (docs/gemm.md); `linear` has laid out its own already.

        Raises:
            ValueError: the kernel reads no scales of this granularity, or powers of two alone.
        """
        n, k = self.data.reshape(-1, self.shape[-1]).shape
        if kernel == "cublaslt":
            return for_cublaslt(self.multiplier, parse_granularity(self.granularity), (n, k))
        return for_deepgemm(self.multiplier, n, self.block[0])

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weight, by default in the dtype it had before packing.

        The product is taken in float32 and rounded once.
        """
        dtype = dtype or self.source_dtype
        if not self.data.numel():
            return torch.empty(self.shape, dtype=dtype, device=self.data.device)
        rows = self.data.reshape(-1, self.shape[-1])
        return torch_codec.dequantize(rows, self.multiplier, self.block).reshape(self.shape).to(dtype)


def grid_of(scale: Tensor, shape: tuple[int, int], block: tuple[int, int], *, tiled: bool) -> Tensor:
    """Return stored scales of a weight [N, K] as [ceil(N/R), ceil(K/C)], in their dtype."""
    grid = (-(-shape[0] // block[0]), -(-shape[1] // block[1]))
    if not tiled:
        return scale.reshape(grid)
    return untile(scale.view(torch.uint8), grid)
