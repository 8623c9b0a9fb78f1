"""Our Triton kernels: GEMMs that torch does not have, on NVIDIA GPUs from SM80 on."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fp8pack.gemm.activations import float_scale_of, quantize_activation
from fp8pack.gemm.device import DeviceFacts
from fp8pack.gemm.layouts import pad
from fp8pack.gemm.operand import Operand
from fp8pack.gemm.scheme import GemmScheme
from fp8pack.gemm.triton_gemm import dequantize_gemm, scaled_gemm, serves
from fp8pack.units import round_up

_MULTIPLE = 16  # bytes of a load
_SHAPE = (384, 384)  # of a weight that is larger than every supported region


def triton_problem(scheme: GemmScheme, facts: DeviceFacts) -> str | None:
    """Return why our kernels do not support a scheme on a device, None if they should."""
    if facts.kind != "cuda":
        return "fp8pack's Triton kernels run only on NVIDIA GPUs"
    if facts.capability < (8, 0):
        return f"fp8pack's Triton kernels need SM80 or later, not SM{facts.capability[0]}{facts.capability[1]}"
    return serves(scheme.granularity.region(_SHAPE), _SHAPE)


@dataclass(frozen=True, slots=True)
class TritonBackend:
    """Multiplies FP8 weights by FP8 or BF16 activations; edges are masked, and K is padded for long loads."""

    name: str = "triton"

    def prepare(self, payload: Tensor, scale: Tensor, scheme: GemmScheme) -> Operand:
        """Return a weight with unchanged float32 scales; rows begin at multiples of 16 bytes."""
        n, k = payload.shape
        return Operand(pad(payload, n, round_up(k, _MULTIPLE)), scale, (n, k), scheme, self)

    def matmul(self, x: Tensor, weight: Operand, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        """Return x @ weight^T + bias, each step of K scaled and added in float32.

        Float32 activations are rounded to BF16 if they are not quantized.
        """
        n, cols = weight.payload.shape
        region, activation = weight.scheme.granularity.region((n, cols)), weight.scheme.activation
        if activation is None:
            x = x.to(torch.bfloat16) if x.dtype == torch.float32 else x
            x = torch.nn.functional.pad(x, (0, cols - x.shape[1])).contiguous()
            return dequantize_gemm(
                x, weight.payload, weight.kernel_scale, b_region=region, bias=bias, out_dtype=out_dtype
            )
        payload, scale = quantize_activation(x, activation, padded=(x.shape[0], cols), scale=weight.input_scale)
        return scaled_gemm(
            payload,
            float_scale_of(scale),
            weight.payload,
            weight.kernel_scale,
            a_cols=activation.cols,
            b_region=region,
            bias=bias,
            out_dtype=out_dtype,
        )
