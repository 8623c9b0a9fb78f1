"""GEMMs with FP8 weights in Triton, for every common scale region and any M, N and K."""

import torch
import triton.language as tl
from torch import Tensor

from fp8pack.gemm import triton_kernels as kernels
from fp8pack.gemm.triton_activations import casts_fp8
from fp8pack.units import ceil_div

_WHOLE = 2**30  # rows or columns of a region that covers a whole axis
_GROUP_M = 8  # tiles of rows that share weights in the cache
_OPERANDS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def serves(region_b: tuple[int, int], shape: tuple[int, int]) -> str | None:
    """Return None if the GEMMs support a weight [N, K] of this shape with R x C scale regions, else why not."""
    if 0 in shape:
        return f"the weight {shape} is empty"
    if _step(region_b[1], shape[1]) == 0:
        return f"{region_b[1]} columns per scale are neither a power of two from 16 on nor a multiple of 128"
    return None


def scaled_gemm(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    *,
    a_cols: int | None,
    b_region: tuple[int, int],
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """Return (a * a_scale) @ (b * b_scale)^T + bias: FP8 activations times FP8 weights.

    Shapes: a [M, K] float8_e4m3fn; a_scale [1] or [M, 1] if a_cols is None, else [M, ceil(K / a_cols)]; b [N, K]
        float8_e4m3fn or float8_e5m2, both with K contiguous; b_scale [ceil(N/R), ceil(K/C)] for b_region (R, C);
        scales float32, any strides; bias [N]; the result [M, N] bfloat16, float16 or float32.
    Numerics: the sum over each step of K, at most 128 columns, is scaled and added in float32, and the total rounded
        once. On a device without FP8 tensor cores the operands are cast to bfloat16, exactly.
    Raises:
        ValueError: `serves` refuses the region or a_cols.
    """
    if a_scale.numel() == 1:
        a_scale, a_cols = a_scale.reshape(1, 1).expand(a.shape[0], 1), None
    step = min(_checked_step(b_region[1], b), _checked_step(a_cols or _WHOLE, a))
    # An FP8 instruction multiplies at least 32 columns.
    operand = None if casts_fp8(a.device) and step >= 32 else tl.bfloat16
    return _multiply(a, a_scale, b, b_scale, a_cols, b_region, bias, out_dtype, operand, step)


def dequantize_gemm(
    x: Tensor, b: Tensor, b_scale: Tensor, *, b_region: tuple[int, int], bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """Return x @ (b * b_scale)^T + bias: activations that are not quantized times FP8 weights.

    Shapes: x [M, K] bfloat16 or float16 with K contiguous; b, b_scale, b_region, bias and the result as in
        `scaled_gemm`.
    Numerics: FP8 is cast to the type of x, exactly; each step of K, at most 128 columns, is scaled and added in
        float32, and the sum rounded once.
    Raises:
        ValueError: `serves` refuses the region, or x is of another type.
    """
    if x.dtype not in _OPERANDS:
        raise ValueError(f"activations must be bfloat16 or float16, not {x.dtype}")
    step = _checked_step(b_region[1], b)
    return _multiply(x, None, b, b_scale, None, b_region, bias, out_dtype, _OPERANDS[x.dtype], step)


def _multiply(
    a: Tensor,
    a_scale: Tensor | None,
    b: Tensor,
    b_scale: Tensor,
    a_cols: int | None,
    b_region: tuple[int, int],
    bias: Tensor | None,
    out_dtype: torch.dtype,
    operand: tl.dtype | None,
    step: int,
) -> Tensor:
    (m, k), n = a.shape, b.shape[0]
    out = torch.empty((m, n), dtype=out_dtype, device=a.device)
    if not out.numel():
        return out
    block_m, block_n, warps, stages = _blocks(m, n)
    if operand is not None and m > 16:
        step = min(step, 64)  # fits into registers and shared memory of every device in 16 bits
    rows = b_region[0] if b_region[0] < n else _WHOLE
    widths = [cols if cols is not None and cols < k else _WHOLE for cols in (a_cols, b_region[1])]
    with torch.cuda.device(a.get_device()):
        kernels.multiply[(ceil_div(m, block_m) * ceil_div(n, block_n),)](
            _readable(a), a_scale, _readable(b), b_scale, bias, out, m, n, k, a.stride(0), b.stride(0),
            *((0, 0) if a_scale is None else a_scale.stride()), *b_scale.stride(), widths[0], rows, widths[1],
            ALONG_K=min(widths) < _WHOLE,
            OPERAND=tl.float32 if a.device.type == "cpu" else operand,  # the only type of Triton's interpreter
            E5M2=b.dtype == torch.float8_e5m2,
            EVEN_K=k % step == 0,
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=step, GROUP_M=_GROUP_M,
            num_warps=warps, num_stages=stages, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def _blocks(m: int, n: int) -> tuple[int, int, int, int]:
    """Return rows and columns of a tile of the result, warps, and load stages, chosen by the shape only.

    Few rows: reading the weights takes all the time, so many small tiles keep many loads in flight. More rows: tiles of
    128 x 128 if there is one for each of about 132 multiprocessors.
    """
    if m <= 16:
        return 16, 32, 4, 8
    if m <= 64 or ceil_div(m, 128) * ceil_div(n, 128) < 132:
        return 64, 64, 4, 5
    return 128, 128, 8, 3


def _step(cols: int, k: int) -> int:
    """Return the columns of a step for regions of this width, 0 if the width is not supported."""
    if cols >= k or cols % 128 == 0:
        return 128
    return cols if cols >= 16 and cols & (cols - 1) == 0 else 0


def _checked_step(cols: int, operand: Tensor) -> int:
    step = _step(cols, operand.shape[1])
    if step == 0:
        raise ValueError(f"{cols} columns per scale are not supported: see serves()")
    return step


def _readable(operand: Tensor) -> Tensor:
    """Return FP8 as bytes if Triton does not have the type on this device."""
    fp8 = operand.dtype in (torch.float8_e4m3fn, torch.float8_e5m2)
    return operand.view(torch.uint8) if fp8 and not casts_fp8(operand.device) else operand
