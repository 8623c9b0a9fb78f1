"""Activations to FP8 on the device, in Triton: memory is read once if the granularity allows it."""

import torch
import triton
from torch import Tensor

from fp8pack.gemm import triton_kernels as kernels
from fp8pack.numerics import swizzle
from fp8pack.numerics.granularity import CHANNEL, MX, TENSOR, Granularity
from fp8pack.units import ceil_div

_LONGEST = 32768  # columns that fit into the registers of one block of 512 threads
_TILE = 4, 1024


def casts_fp8(device: torch.device) -> bool:
    """Say whether Triton casts to E4M3 and multiplies FP8 on this device: NVIDIA's from SM89 on."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 9)


def quantize(
    x: Tensor, granularity: Granularity, *, padded: tuple[int, int], scale: Tensor | None = None, tiled: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the E4M3 payload of activations and the scales that dequantize it, asynchronously.

    Shapes: x [M, K] bfloat16, float16 or float32, K contiguous; payload [Mp, Kp] = padded, zeros beyond x. Scales:
        tensor float32 [1], the given one or amax's; channel float32 [Mp, 1]; group:G float32 [Mp, ceil(Kp/G)] with
        strides (1, Mp), as cuBLASLt needs 1x128; mx uint8 exponents [Mp, ceil(Kp/32)], or if `tiled` in the order
        of numerics/swizzle.py, padded there with zeros.
    Numerics: those of numerics/torch_codec.py, bit for bit; mx is rounded up. The scale of padding is 1.0. A region
        with a NaN or infinity gets the scale NaN and a payload of NaN; with a given scale only those elements are NaN.
    Raises:
        ValueError: x is not 2-D with K contiguous, x is larger than padded, or the granularity is not supported.
    """
    _check(x, granularity, padded, scale)
    payload = torch.empty(padded, dtype=torch.uint8, device=x.device)
    scales = _new_scales(granularity, padded, tiled, x.device) if scale is None else scale.reshape(1)
    if not payload.numel():
        return payload.view(torch.float8_e4m3fn), scales if scale is not None else scales.fill_(1)
    with torch.cuda.device(x.get_device()):
        if granularity == TENSOR:
            _by_tensor(x, payload, scales, computed=scale is None)
        elif granularity == CHANNEL and padded[1] > _LONGEST:
            kernels.quantize_long_rows[(padded[0],)](
                x, payload, scales, *x.shape, padded[1], x.stride(0), casts_fp8(x.device), 8192,
                num_warps=8, enable_fp_fusion=False,
            )  # fmt: skip
        else:
            width = granularity.cols or int(triton.next_power_of_2(padded[1]))
            _by_region(x, payload, scales, width, mx=granularity == MX, tiled=tiled)
    return payload.view(torch.float8_e4m3fn), scales


def _check(x: Tensor, granularity: Granularity, padded: tuple[int, int], scale: Tensor | None) -> None:
    if x.ndim != 2 or (x.shape[1] > 1 and x.stride(1) != 1):
        raise ValueError("activations must be 2-D with contiguous rows")
    if x.shape[0] > padded[0] or x.shape[1] > padded[1]:
        raise ValueError(f"activations {tuple(x.shape)} do not fit into {padded}")
    if granularity in (TENSOR, CHANNEL):
        if scale is not None and (granularity == CHANNEL or scale.numel() != 1):
            raise ValueError("a given scale must have one element and the granularity tensor")
        return
    width = granularity.cols or 0
    if scale is not None or granularity.rows != 1 or not 32 <= width <= _LONGEST or width & (width - 1):
        raise ValueError(f"activation scales must be 1xG, G a power of two from 32 to {_LONGEST}, not {granularity}")


def _new_scales(granularity: Granularity, padded: tuple[int, int], tiled: bool, device: torch.device) -> Tensor:
    if granularity == TENSOR:
        return torch.empty(1, dtype=torch.float32, device=device)
    grid = granularity.scale_shape(padded)
    if granularity == MX and tiled:
        return torch.zeros(swizzle.padded(grid), dtype=torch.uint8, device=device)
    if granularity == MX:
        return torch.empty(grid, dtype=torch.uint8, device=device)
    return torch.empty_strided(grid, (1, grid[0]), dtype=torch.float32, device=device)


def _by_tensor(x: Tensor, payload: Tensor, scale: Tensor, *, computed: bool) -> None:
    amax = torch.zeros(1, dtype=torch.int32, device=x.device) if computed else None
    if computed and x.numel():
        kernels.find_amax[_grid(x, _TILE)](x, amax, *x.shape, x.stride(0), *_TILE, enable_fp_fusion=False)
    kernels.quantize_tensor[_grid(payload, _TILE)](
        x, payload, scale, amax, *x.shape, *payload.shape, x.stride(0), casts_fp8(x.device), *_TILE,
        enable_fp_fusion=False,
    )  # fmt: skip


def _by_region(x: Tensor, payload: Tensor, scales: Tensor, width: int, *, mx: bool, tiled: bool) -> None:
    cols = max(width, min(1024, triton.next_power_of_2(payload.shape[1])))
    tile = max(1, 4096 // cols), cols
    kernels.quantize_regions[_grid(payload, tile)](
        x, payload, scales, *x.shape, *payload.shape, x.stride(0), *scales.stride(),
        width, mx, mx and tiled, casts_fp8(x.device), *tile,
        num_warps=min(16, max(4, tile[0] * cols // 2048)), enable_fp_fusion=False,
    )  # fmt: skip


def _grid(tensor: Tensor, tile: tuple[int, int]) -> tuple[int, int]:
    return ceil_div(tensor.shape[0], tile[0]), ceil_div(tensor.shape[1], tile[1])
