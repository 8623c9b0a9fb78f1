"""FP8 linear layers: activations quantized to match the weight, FP8 GEMM, BF16 out. For inference: no gradients."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from fp8pack.gemm.operand import Operand
from fp8pack.numerics.granularity import CHANNEL, TENSOR
from fp8pack.runtime.packed_tensor import PackedTensor


def linear(
    x: Tensor,
    weight: PackedTensor,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Return x @ weight^T + bias, computed in FP8 where the device can.

    Shapes: x [..., K] bfloat16, float16 or float32; weight [N, K]; bias [N]; the result [..., N] of out_dtype.
    Numerics: x becomes E4M3 with scales that match the weight's: one for the tensor, for each token, for each 1x128, MX
        1x32, or the static `input_scale` (by default the weight's own), float32, a multiplier; products of FP8 values
        are accumulated in float32. A weight-only checkpoint leaves x as it is. Any M, N and K: padding never changes a
        result.
    Raises:
        ValueError: shapes or devices do not fit, or a static scale is given beside scales of blocks.
    """
    if weight.data.ndim != 2:
        raise ValueError(f"{weight.name} {list(weight.shape)} holds several weights: linear takes one [N, K]")
    operand = weight.operand
    if x.shape[-1] != operand.shape[1]:
        raise ValueError(f"x has K = {x.shape[-1]}, and {weight.name} {list(weight.shape)} takes {operand.shape[1]}")
    if x.device != operand.payload.device:
        raise ValueError(f"x is on {x.device}, and {weight.name} on {operand.payload.device}")
    if input_scale is not None:
        operand = _with_input_scale(operand, input_scale, weight.name)
    rows = x.detach().reshape(-1, x.shape[-1])
    if rows.numel() == 0 or operand.payload.numel() == 0:
        out = torch.zeros(rows.shape[0], operand.shape[0], dtype=out_dtype, device=x.device)
        out = out if bias is None else (out + bias).to(out_dtype)
    else:
        out = operand.backend.product(rows, operand, bias, out_dtype)
    return out.reshape(*x.shape[:-1], operand.shape[0])


def _with_input_scale(operand: Operand, scale: Tensor, name: str) -> Operand:
    if operand.scheme.activation not in (TENSOR, CHANNEL) or scale.numel() != 1:
        raise ValueError(f"{name} has {operand.scheme.granularity} scales: a static one does not go with them")
    return replace(operand, input_scale=scale.to(operand.payload.device, torch.float32).reshape(1))


class FP8Linear(nn.Module):
    """An nn.Linear of a packed weight [N, K]; parameters are the payload and its scales, which keep their dtypes.

    out_dtype: that of the input by default.
    """

    def __init__(self, weight: PackedTensor, bias: Tensor | None = None, out_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.out_dtype = out_dtype
        self._packed = weight
        self.weight = nn.Parameter(weight.data, requires_grad=False)
        self.weight_scale_inv = nn.Parameter(weight.scale, requires_grad=False)
        self.input_scale = None if weight.input_scale is None else nn.Parameter(weight.input_scale, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self._state = self._current()

    @property
    def packed(self) -> PackedTensor:
        """The weight, as it is now: on whatever device, with whatever was loaded into the parameters."""
        state = self._current()
        if state != self._state:
            scale = None if self.input_scale is None else self.input_scale.data
            weight, multiplier = self.weight.data, self.weight_scale_inv.data
            self._packed = replace(self._packed, data=weight, scale=multiplier, input_scale=scale)
            self._state = state
        return self._packed

    def _current(self) -> tuple[tuple[int, int, torch.device], ...]:
        """What changes when a parameter is moved, or written to."""
        parameters = (self.weight, self.weight_scale_inv, self.input_scale)
        return tuple((p.data_ptr(), p._version, p.device) for p in parameters if p is not None)

    def forward(self, x: Tensor) -> Tensor:
        """Return x @ weight^T + bias: x [..., K], the result [..., N]."""
        return linear(x, self.packed, self.bias, out_dtype=self.out_dtype or x.dtype)

    def extra_repr(self) -> str:
        """Shape, scales and back end, as `print(model)` shows them."""
        packed = self._packed
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{packed.format}, {packed.granularity}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FP8Linear":
        """Move payload and scales, and never cast them: `model.to(torch.bfloat16)` would make the bytes numbers."""

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        return self
