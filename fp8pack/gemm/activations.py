"""Quantizing activations: a Triton kernel on NVIDIA GPUs, our own kernel on CPUs, torch elsewhere; the same bytes."""

import math
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from fp8pack.gemm.layouts import tile
from fp8pack.numerics import torch_codec
from fp8pack.numerics.formats import E4M3
from fp8pack.numerics.granularity import MX, TENSOR, Granularity
from fp8pack.numerics.native import quantize_rows
from fp8pack.numerics.rounding import ScaleRounding
from fp8pack.units import ceil_div

_BITS = {
    torch.bfloat16: ("BF16", torch.uint16),
    torch.float16: ("F16", torch.uint16),
    torch.float32: ("F32", torch.uint32),
}


def quantize_activation(
    x: Tensor, granularity: Granularity, *, padded: tuple[int, int], scale: Tensor | None = None, tiled: bool = False
) -> tuple[Tensor, Tensor]:
    """Return activations as E4M3, and the scales that dequantize them.

    Shapes: x [M, K] bfloat16, float16 or float32; payload [M', K'] = padded, zeros beyond M and K. Scales, float32: [1]
        for `tensor`, [M', 1] for `channel` (a token each), [M', ceil(K'/G)] in columns for `group:G`, as cuBLASLt reads
        them; for `mx` exponents, uint8 [M', ceil(K'/32)], or in the tiles of numerics/swizzle.py if `tiled`.
    Numerics: as `torch_codec.quantize`; MX scales are rounded up to powers of two. scale: a static one, float32, one
        element; values beyond its range saturate. A NaN or infinity in x makes all values that share its scale NaN;
        with a static scale only itself.
    """
    kernels = _triton() if x.is_cuda and torch.version.hip is None else None
    if kernels is not None:
        region = granularity if scale is None else TENSOR
        found: tuple[Tensor, Tensor] = kernels.quantize(x, region, padded=padded, scale=scale, tiled=tiled)
        return found
    quantize = quantize_on_cpu if x.device.type == "cpu" and x.numel() else quantize_in_torch
    return quantize(x, granularity, padded=padded, scale=scale, tiled=tiled)


def quantize_on_cpu(
    x: Tensor, granularity: Granularity, *, padded: tuple[int, int], scale: Tensor | None = None, tiled: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the same as `quantize_activation`, in one pass by the kernel that packs weights."""
    wide = torch.nn.functional.pad(x, (0, padded[1] - x.shape[1], 0, padded[0] - x.shape[0])).contiguous()
    region = (TENSOR if scale is not None else granularity).region(padded)
    grid = ceil_div(padded[0], region[0]), ceil_div(padded[1], region[1])
    used = torch.empty(grid) if scale is None else scale.float().reshape(1, 1).clone()
    payload = torch.empty(padded, dtype=torch.uint8)
    dtype, bits = _BITS[x.dtype]
    rounding = ScaleRounding.UP if granularity == MX else ScaleRounding.NONE
    amax = quantize_rows(
        wide.view(bits).numpy(),
        payload.numpy(),
        used.numpy(),
        dtype=dtype,
        region=region,
        format=E4M3,
        rounding=None if scale is not None else rounding,
    )
    if math.isnan(amax):  # the kernel's bytes mean nothing then
        return quantize_in_torch(x, granularity, padded=padded, scale=scale, tiled=tiled)
    return _laid_out(payload.view(torch.float8_e4m3fn), used, granularity if scale is None else TENSOR, tiled=tiled)


def quantize_in_torch(
    x: Tensor, granularity: Granularity, *, padded: tuple[int, int], scale: Tensor | None = None, tiled: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the same as `quantize_activation`, in several passes; the reference for the kernel."""
    wide = torch.nn.functional.pad(x, (0, padded[1] - x.shape[1], 0, padded[0] - x.shape[0]))
    if scale is not None or granularity == TENSOR:
        static = None if scale is None else scale.float().reshape(1, 1)
        payload, used = torch_codec.quantize_unchecked(wide, padded, format=E4M3, scales=static)
        return _laid_out(payload, used, TENSOR, tiled=tiled)
    rounding = ScaleRounding.UP if granularity == MX else ScaleRounding.NONE
    payload, used = torch_codec.quantize_unchecked(wide, granularity.region(padded), format=E4M3, rounding=rounding)
    return _laid_out(payload, used, granularity, tiled=tiled)


def _laid_out(payload: Tensor, used: Tensor, granularity: Granularity, *, tiled: bool) -> tuple[Tensor, Tensor]:
    if granularity == TENSOR:
        return payload, used.reshape(1)
    if granularity == MX:
        exponents = (used.view(torch.int32) >> 23).to(torch.uint8)
        return payload, tile(exponents) if tiled else exponents
    return payload, used if used.shape[1] == 1 else used.t().contiguous().t()


def float_scale_of(scale: Tensor) -> Tensor:
    """Return scales as float32: floats unchanged, exponents (uint8) as powers of two."""
    return scale.view(torch.float8_e8m0fnu).float() if scale.dtype == torch.uint8 else scale


@cache
def _triton() -> ModuleType | None:
    """Our Triton kernels, None if Triton is not installed; only NVIDIA GPUs run them."""
    try:
        return import_module("fp8pack.gemm.triton_activations")
    except ImportError:
        return None
