"""The reference backend: operands are dequantized and multiplied in BF16. It runs on every device."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fp8pack.gemm.activations import float_scale_of, quantize_activation
from fp8pack.gemm.operand import Operand
from fp8pack.gemm.scheme import GemmScheme
from fp8pack.machine import usable_memory
from fp8pack.numerics import torch_codec
from fp8pack.numerics.formats import parse_format
from fp8pack.numerics.granularity import CHANNEL, TENSOR, Granularity
from fp8pack.numerics.native import dequantize_rows

_RESERVE = 4  # a weight is cached if it needs less than a quarter of the available memory


@dataclass(frozen=True, slots=True)
class ReferenceBackend:
    """Dequantizes and multiplies; on a CPU a weight is dequantized once and cached, if memory allows."""

    name: str = "reference"

    def prepare(self, payload: Tensor, scale: Tensor, scheme: GemmScheme) -> Operand:
        """Return a weight with unchanged scales."""
        operand = Operand(payload, scale, (payload.shape[0], payload.shape[1]), scheme, self)
        return replace(operand, values={}) if payload.device.type == "cpu" else operand

    def matmul(self, x: Tensor, weight: Operand, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        """Return x @ weight^T + bias; in BF16, rounded before tensor or channel scales are applied and after.

        Any other out_dtype is computed in float32 and rounded once.
        """
        dtype = torch.bfloat16 if out_dtype == torch.bfloat16 else torch.float32
        values = _cached_values(weight, dtype)
        inputs, scale = _rounded(x, weight, dtype)
        out = torch.nn.functional.linear(inputs, values).float()
        if _scales_after(weight.scheme.granularity):
            out *= weight.kernel_scale.reshape(1, -1)
        if scale is not None:
            out *= scale
        return (out if bias is None else out + bias.float()).to(out_dtype)


def _cached_values(weight: Operand, dtype: torch.dtype) -> Tensor:
    """The weight in a float dtype: cached at its first use, if memory allows."""
    if weight.values is None:
        return _values(weight, dtype)
    if dtype not in weight.values:
        found = _values(weight, dtype)
        if found.nbytes >= usable_memory() // _RESERVE:
            return found
        weight.values[dtype] = found
    return weight.values[dtype]


def _scales_after(granularity: Granularity) -> bool:
    """Whether scales are applied to the result of the GEMM, so that its operands are exact FP8 values."""
    return granularity in (TENSOR, CHANNEL)


def _values(weight: Operand, dtype: torch.dtype) -> Tensor:
    """The weight in a float dtype, without its scales if they are applied to the result."""
    if _scales_after(weight.scheme.granularity):
        return weight.payload.to(dtype)
    region = weight.scheme.granularity.region(weight.shape)
    return dequantize(weight.payload, weight.kernel_scale, region).to(dtype)


def _rounded(x: Tensor, weight: Operand, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The quantized activations in a float dtype, and the scales to apply to the result: [1, 1] or [M, 1]."""
    activation = weight.scheme.activation
    if activation is None:
        return x.to(dtype), None
    payload, found = quantize_activation(x, activation, padded=(x.shape[0], x.shape[1]), scale=weight.input_scale)
    scale = float_scale_of(found)
    if scale.numel() == 1 or activation == CHANNEL:
        return payload.to(dtype), scale.reshape(-1, 1)
    return dequantize(payload, scale, activation.region((x.shape[0], x.shape[1]))).to(dtype), None


def dequantize(payload: Tensor, scales: Tensor, region: tuple[int, int]) -> Tensor:
    """Return the same as `torch_codec.dequantize`; on a CPU in one pass of the kernel."""
    if payload.device.type == "cpu" and payload.numel():
        values = torch.empty(payload.shape)
        amax = dequantize_rows(
            payload.view(torch.uint8).contiguous().numpy(),
            scales.contiguous().numpy(),
            values.view(torch.uint32).numpy(),
            region=region,
            format=parse_format(str(payload.dtype).removeprefix("torch.")),
        )
        if not math.isnan(amax):  # of a NaN byte, what the kernel writes means nothing
            return values
    return torch_codec.dequantize(payload, scales, region)
