"""FP8 linear layers: activations quantized to match the weight, FP8 GEMM, BF16 out. For inference: no gradients."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fp8pack.gemm.operand import Operand
from fp8pack.numerics.granularity import CHANNEL, TENSOR
from fp8pack.runtime.packed_tensor import PackedTensor

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def linear(
    x: Tensor,
    weight: PackedTensor,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Return x @ weight^T + bias, computed in FP8 if the device supports it.

    Shapes: x [..., K] bfloat16, float16 or float32; weight [N, K]; bias [N]; the result [..., N] of out_dtype, one of
        these three.
    Numerics: x is quantized to E4M3 with scales that match the weight's: one per tensor, per token, per 1x128, MX 1x32,
        or the static `input_scale` (by default the weight's own), float32, a multiplier; the GEMM accumulates in
        float32. For a weight-only checkpoint x is not quantized. Any M, N and K: padding never changes a result. A NaN
        in x makes all values that share its scale NaN. Autocast is ignored.
    Raises:
        ValueError: shapes, dtypes or devices do not match, or a static scale is given for a weight with block scales.
    """
    if weight.qdata.ndim != 2:
        raise ValueError(f"{weight.name} {list(weight.shape)} is several weights, and linear needs one [N, K]")
    operand = weight.operand
    n, k = operand.shape
    if x.dtype not in _DTYPES or out_dtype not in _DTYPES:
        raise ValueError(f"x is {x.dtype}, out_dtype {out_dtype}: linear supports bfloat16, float16 and float32")
    if x.ndim == 0 or x.shape[-1] != k:
        raise ValueError(f"x has shape {list(x.shape)}, and {weight.name} {[n, k]} needs [..., {k}]")
    if x.device != operand.payload.device:
        raise ValueError(f"x is on {x.device}, and {weight.name} on {operand.payload.device}")
    if bias is not None and (bias.shape != (n,) or bias.device != x.device):
        raise ValueError(f"bias is {list(bias.shape)} on {bias.device}, and {weight.name} needs [{n}] on {x.device}")
    if input_scale is not None:
        operand = _with_input_scale(operand, input_scale, weight.name)
    rows = x.detach().reshape(x.shape[:-1].numel(), k)
    with torch.autocast(x.device.type, enabled=False):
        out = _gemm(rows, operand, None if bias is None else bias.detach().contiguous(), out_dtype)
    return out.reshape(*x.shape[:-1], n)


def _gemm(rows: Tensor, operand: Operand, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    if rows.numel() and operand.payload.numel():
        return operand.backend.matmul(rows, operand, bias, out_dtype)
    out = torch.zeros(rows.shape[0], operand.shape[0], dtype=out_dtype, device=rows.device)
    return out if bias is None else (out + bias).to(out_dtype)


def _with_input_scale(operand: Operand, scale: Tensor, name: str) -> Operand:
    if operand.scheme.activation not in (TENSOR, CHANNEL) or scale.numel() != 1:
        raise ValueError(f"{name} has {operand.scheme.granularity} scales, which exclude a static activation scale")
    return replace(operand, input_scale=scale.to(operand.payload.device, torch.float32).reshape(1))


class FP8Linear(nn.Module):
    """An nn.Linear of a packed weight [N, K]; its parameters are qdata and its scales, which keep their dtypes.

    The result has the dtype of the input, or `out_dtype`. The weight is prepared for the device again when the module
    is moved, loaded into or given other parameters; a write into a parameter in place is not noticed.
    """

    def __init__(self, weight: PackedTensor, bias: Tensor | None = None, out_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        if weight.qdata.ndim != 2:
            raise ValueError(f"{weight.name} {list(weight.shape)} is several weights, and FP8Linear needs one [N, K]")
        self.out_features, self.in_features = weight.shape
        self.out_dtype = out_dtype
        self.weight = nn.Parameter(weight.qdata, requires_grad=False)
        self.weight_scale_inv = nn.Parameter(weight.stored_scale, requires_grad=False)
        self.input_scale = None if weight.input_scale is None else nn.Parameter(weight.input_scale, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        nothing = torch.empty(0)
        self._form = replace(weight, qdata=nothing, stored_scale=nothing, input_scale=None)
        self._prepared: tuple[tuple[nn.Parameter | None, ...], PackedTensor] | None = None

    def set_activations(self, mode: Literal["none", "dynamic", "static"]) -> None:
        """Choose how inputs are quantized, whatever the checkpoint declares.

        Raises:
            ValueError: a static scale is asked for, and the checkpoint has none for this weight.
        """
        if mode == "static" and self.input_scale is None:
            raise ValueError(f"{self.name} has no static scale of its input")
        self._form, self._prepared = replace(self._form, weight_only=mode == "none"), None
        if mode != "static":
            self.input_scale = None

    @property
    def name(self) -> str:
        """The name of the weight in its checkpoint."""
        return self._form.name

    @property
    def packed(self) -> PackedTensor:
        """The weight, made of the current parameters."""
        parameters = (self.weight, self.weight_scale_inv, self.input_scale)
        if self._prepared is None or any(a is not b for a, b in zip(self._prepared[0], parameters, strict=True)):
            qdata, stored_scale = self.weight.data, self.weight_scale_inv.data
            input_scale = None if self.input_scale is None else self.input_scale.data
            packed = replace(self._form, qdata=qdata, stored_scale=stored_scale, input_scale=input_scale)
            self._prepared = (parameters, packed)
        return self._prepared[1]

    def forward(self, x: Tensor) -> Tensor:
        """Return x @ weight^T + bias: x [..., K], the result [..., N]."""
        return linear(x, self.packed, self.bias, out_dtype=self.out_dtype or x.dtype)

    def extra_repr(self) -> str:
        """Return shape, format and granularity for `print(model)`."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self._form.format}, {self._form.granularity}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FP8Linear":
        """Move payload and scales without a cast: `model.to(torch.bfloat16)` would turn the bytes into numbers."""

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        self._prepared = None
        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._prepared = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the prepared weight out of copies and pickles."""
        return {**self.__dict__, "_prepared": None}
