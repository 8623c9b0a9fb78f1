"""torch.nn.functional.scaled_mm: cuBLASLt (or CUTLASS) on NVIDIA, hipBLASLt on AMD; on a CPU tensor and row scales.

It needs both operands with K contiguous, N and K multiples of 16, pointers aligned to 16 bytes, and scales in the
layouts of cuBLASLt (docs/gemm.md). M is padded for each GEMM, N and K once.
Sources: torch.nn.functional.scaled_mm, torch/csrc ScaledBlas.cpp; cuBLAS documentation, cublasLtMatmulMatrixScale_t.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import ScalingType, SwizzleType, scaled_mm

from fp8pack.gemm.activations import quantize_activation
from fp8pack.gemm.device import DeviceFacts
from fp8pack.gemm.layouts import for_cublaslt, pad
from fp8pack.gemm.operand import Operand
from fp8pack.gemm.scheme import GemmScheme
from fp8pack.numerics.formats import E4M3
from fp8pack.numerics.granularity import BLOCK_128, CHANNEL, MX, TENSOR
from fp8pack.numerics.torch_codec import as_fnuz
from fp8pack.units import round_up

_MULTIPLE = 16
_RECIPES = {
    TENSOR: (ScalingType.TensorWise, ScalingType.TensorWise),
    CHANNEL: (ScalingType.RowWise, ScalingType.RowWise),
    BLOCK_128: (ScalingType.BlockWise1x128, ScalingType.BlockWise128x128),
    MX: (ScalingType.BlockWise1x32, ScalingType.BlockWise1x32),
}


def torch_problem(scheme: GemmScheme, facts: DeviceFacts) -> str | None:
    """Return why torch has no GEMM for a scheme on a device, None if it should have one."""
    if scheme.activation is None:
        return "no GEMM of FP8 weights with BF16 activations"
    if scheme.granularity not in _RECIPES:
        return f"no GEMM with {scheme.granularity} scales"
    match facts.kind:
        case "cpu":
            supported = scheme.granularity in (TENSOR, CHANNEL)
            return None if supported else f"no GEMM with {scheme.granularity} scales on CPUs"
        case "cuda":
            return _problem_on_nvidia(scheme, facts)
        case "hip":
            return _problem_on_amd(scheme, facts)
        case _:
            return f"fp8pack does not support torch's FP8 GEMMs on {facts.kind}"


def _problem_on_nvidia(scheme: GemmScheme, facts: DeviceFacts) -> str | None:
    capability = facts.capability
    if capability < (8, 9):
        return f"SM{capability[0]}{capability[1]} has no FP8 tensor cores (SM89 or later needed)"
    if scheme.granularity == BLOCK_128 and (capability[0] != 9 or facts.toolkit < (12, 9)):
        return "cuBLASLt supports block:128x128 scales only on SM90 with CUDA 12.9 or later"
    if scheme.granularity == MX and (capability < (10, 0) or scheme.format != E4M3):
        return "cuBLASLt supports MX scales only for E4M3 on SM100 or later"
    return None


def _problem_on_amd(scheme: GemmScheme, facts: DeviceFacts) -> str | None:
    if not facts.arch.startswith(("gfx94", "gfx95", "gfx12")):
        return f"{facts.arch} has no FP8 matrix cores (gfx942 or later needed)"
    if scheme.granularity not in (TENSOR, CHANNEL):
        return f"fp8pack does not support {scheme.granularity} scales with hipBLASLt"
    return None


@dataclass(frozen=True, slots=True)
class TorchBackend:
    """Calls scaled_mm."""

    name: str = "torch"

    def prepare(self, payload: Tensor, scale: Tensor, scheme: GemmScheme) -> Operand:
        """Return a weight, N and K padded for the kernel, its scales in cuBLASLt's layout."""
        n, k = payload.shape
        rows = round_up(n, 128 if scheme.granularity == MX else _MULTIPLE)
        cols = round_up(k, 128 if scheme.granularity in (BLOCK_128, MX) else _MULTIPLE)
        laid_out = for_cublaslt(scale, scheme.granularity, (rows, cols))
        return Operand(pad(payload, rows, cols), laid_out, (n, k), scheme, self)

    def matmul(self, x: Tensor, weight: Operand, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        """Return x @ weight^T + bias, accumulated in float32 (`use_fast_accum` is off)."""
        (m, _), (n, _), granularity = x.shape, weight.shape, weight.scheme.granularity
        padded = (round_up(m, _MULTIPLE), weight.payload.shape[1])
        activation, tiled = weight.scheme.activation or TENSOR, granularity == MX
        payload, scale = quantize_activation(x, activation, padded=padded, scale=weight.input_scale, tiled=tiled)
        if granularity == CHANNEL:
            scale = scale.expand(padded[0], 1).contiguous()  # a static scale is repeated for each token
        if granularity == MX:
            scale = scale.view(torch.float8_e8m0fnu).reshape(-1)
        if weight.payload.dtype == torch.float8_e4m3fnuz:
            payload, scale = as_fnuz(payload), scale * 2
        recipe_a, recipe_b = _RECIPES[granularity]
        swizzle = SwizzleType.SWIZZLE_32_4_4 if granularity == MX else SwizzleType.NO_SWIZZLE
        out = scaled_mm(
            payload,
            weight.payload.t(),
            scale_a=scale,
            scale_recipe_a=recipe_a,
            scale_b=weight.kernel_scale,
            scale_recipe_b=recipe_b,
            swizzle_a=swizzle,
            swizzle_b=swizzle,
            output_dtype=torch.bfloat16 if granularity == CHANNEL else out_dtype,  # the only one with row scales
        )[:m, :n]
        return (out if bias is None else out + bias).to(out_dtype)
