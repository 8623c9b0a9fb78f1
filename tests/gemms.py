"""What an FP8 GEMM must come to: weights and activations as quantized, in float64."""

import torch
from torch import Tensor

from fp8pack.gemm.activations import float_scale_of, quantize_in_torch
from fp8pack.gemm.scheme import GemmScheme
from fp8pack.numerics import torch_codec
from fp8pack.numerics.granularity import MX
from fp8pack.numerics.rounding import ScaleRounding

AS_QUANTIZED, AS_ENTERED = 5e-3, 4e-2  # relative, Frobenius


def random(*shape: int, seed: int) -> Tensor:
    """Normal values, the same on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weight_of(scheme: GemmScheme, n: int, k: int) -> tuple[Tensor, Tensor]:
    """A payload and its scales, on the CPU."""
    rounding = ScaleRounding.UP if scheme.granularity == MX else ScaleRounding.NONE
    region = scheme.granularity.region((n, k))
    return torch_codec.quantize(random(n, k, seed=n * k), region, format=scheme.format, rounding=rounding)


def as_quantized(x: Tensor, scheme: GemmScheme, static: Tensor | None = None) -> Tensor:
    """An activation as the GEMM takes it, float64, on the CPU."""
    if scheme.activation is None:
        return x.double()
    m, k = x.shape
    payload, scale = quantize_in_torch(x, scheme.activation, padded=(m, k), scale=static)
    region = (m, k) if scale.numel() == 1 else scheme.activation.region((m, k))
    return torch_codec.dequantize(payload, float_scale_of(scale).reshape(-1, scale.shape[-1]), region).double()


def error(found: Tensor, expected: Tensor) -> float:
    """The relative error (Frobenius) of a result of any device."""
    return float((found.cpu().double() - expected).norm() / expected.norm())
