"""Our Triton kernels: what torch has no product for, on NVIDIA GPUs from SM80 on."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fp8pack.gemm.activations import multiplier_of, quantize_activation
from fp8pack.gemm.device import DeviceFacts
from fp8pack.gemm.operand import Operand
from fp8pack.gemm.scheme import Scheme
from fp8pack.gemm.triton_gemm import dequantize_gemm, scaled_gemm, serves

_SHAPE = (384, 384)  # of a weight that is larger than any region that kernels know


def triton_problem(scheme: Scheme, facts: DeviceFacts) -> str | None:
    """Return why our kernels do not compute the products of a scheme on a device, None if they should."""
    if facts.kind != "cuda":
        return "fp8pack's Triton kernels are for NVIDIA GPUs"
    if facts.capability < (8, 0):
        return f"fp8pack's Triton kernels begin with SM80, this is SM{facts.capability[0]}{facts.capability[1]}"
    return serves(scheme.granularity.region(_SHAPE), _SHAPE)


@dataclass(frozen=True, slots=True)
class TritonBackend:
    """Multiplies FP8 by FP8, or leaves activations as they are; edges are masked, so nothing is padded."""

    name: str = "triton"

    def prepare(self, payload: Tensor, multiplier: Tensor, scheme: Scheme) -> Operand:
        """Return a weight with its scales in float32, as they are."""
        return Operand(payload.contiguous(), multiplier, (payload.shape[0], payload.shape[1]), scheme, self)

    def product(self, x: Tensor, weight: Operand, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        """Return x @ weight^T + bias, each step of K scaled and added in float32."""
        region, activation = weight.scheme.granularity.region(weight.shape), weight.scheme.activation
        if activation is None:
            return dequantize_gemm(
                x.contiguous(), weight.payload, weight.scale, b_region=region, bias=bias, out_dtype=out_dtype
            )
        payload, scale = quantize_activation(x, activation, padded=(x.shape[0], x.shape[1]), scale=weight.input_scale)
        return scaled_gemm(
            payload,
            multiplier_of(scale),
            weight.payload,
            weight.scale,
            a_cols=activation.cols,
            b_region=region,
            bias=bias,
            out_dtype=out_dtype,
        )
