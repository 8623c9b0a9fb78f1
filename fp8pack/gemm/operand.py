"""A weight, prepared once for the GEMM of its device."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fp8pack.gemm.scheme import GemmScheme


@dataclass(frozen=True, slots=True)
class Operand:
    """An FP8 weight, padded, its scales in the layout of a backend.

    payload: [N', K'] FP8, K contiguous. kernel_scale: in the backend's layout. shape: [N, K] before padding.
    input_scale: the static scale of the input activations, float32, one element. values: the weight in each float dtype
    that was asked for, None if the backend caches none.
    """

    payload: Tensor
    kernel_scale: Tensor
    shape: tuple[int, int]
    scheme: GemmScheme
    backend: "Backend"
    input_scale: Tensor | None = None
    values: dict[torch.dtype, Tensor] | None = None

    def __str__(self) -> str:
        return self.scheme.describe(static=self.input_scale is not None)

    @property
    def padding(self) -> float:
        """The share of the payload that is padding."""
        total = self.payload.numel()
        return 1 - self.shape[0] * self.shape[1] / total if total else 0.0


class Backend(Protocol):
    """Computes x @ weight^T from FP8 operands, accumulated in float32."""

    @property
    def name(self) -> str:
        """`torch`, `triton` or `reference`."""
        ...

    def prepare(self, payload: Tensor, scale: Tensor, scheme: GemmScheme) -> Operand:
        """Return a weight [N, K] with its scales, float32 [ceil(N/R), ceil(K/C)], padded and in its layout."""
        ...

    def matmul(self, x: Tensor, weight: Operand, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        """Return x @ weight^T + bias: x [M, K] in any float dtype, bias [N], the result [M, N]."""
        ...
