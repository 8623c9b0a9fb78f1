"""The Triton kernels: activations to FP8, and GEMMs with FP8 weights.

Legend: activations [M, K], weights [N, K], both with K contiguous; scales are the multipliers that dequantize. Payloads
are written as uint8, so that a device without FP8 types (before SM89, and Triton's interpreter) runs the same kernels:
there CAST is false and FP8 is rounded and read in integers. Division is `div_rn`, the other roundings are those of
fp8pack.numerics.torch_codec: the bytes are equal (tests/gemm/test_triton.py).
"""

import triton
import triton.language as tl

from fp8pack.numerics.formats import E4M3
from fp8pack.numerics.scaling import MIN_SCALE

_MAX = tl.constexpr(E4M3.max)
_MIN_SCALE = tl.constexpr(MIN_SCALE)
_INFINITY_BITS = tl.constexpr(0x7F800000)
_REBIAS = tl.constexpr(2.0 ** (127 - E4M3.bias))  # from the exponent bias of E4M3 to that of float32


@triton.jit
def _float32(x):
    """Return x in float32, exactly; the interpreter's own cast loses the subnormals of bfloat16."""
    if x.dtype == tl.bfloat16:
        x = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def _magnitude(x):
    """Return the bits of |x|: as integers, NaNs are above all numbers, so a maximum keeps them."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _scale(amax, UP: tl.constexpr):
    """Return the scales of regions with these magnitudes; NaN for a region that is not finite."""
    scale = tl.maximum(tl.div_rn(amax.to(tl.float32, bitcast=True), _MAX), _MIN_SCALE)
    if UP:
        scale = ((scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & _INFINITY_BITS).to(tl.float32, bitcast=True)
    return tl.where(amax < _INFINITY_BITS, tl.where(amax == 0, 1.0, scale), float("nan"))


@triton.jit
def _payload(x, scale, CAST: tl.constexpr):
    """Return the E4M3 bytes of RNE(clamp(x / scale)); NaN where x is infinite, or x or scale is NaN."""
    q = tl.clamp(tl.div_rn(x, scale), -_MAX, _MAX, tl.PropagateNan.ALL)
    q = tl.where(tl.abs(x) == float("inf"), float("nan"), q)
    return q.to(tl.float8e4nv).to(tl.uint8, bitcast=True) if CAST else _round_e4m3(q)


@triton.jit
def _round_e4m3(q):
    """Return the E4M3 bytes nearest to q, ties to even; q is NaN or within the range of E4M3."""
    size = _magnitude(q)
    odd = (size >> 20) & 1
    normal = (size >> 20) - ((127 - 7) << 3) + ((size & 0xFFFFF) + odd > 0x80000).to(tl.int32)
    # Beside 2^14 a float32 has steps of 2^-9, those of E4M3's subnormals: the addition rounds.
    subnormal = (tl.abs(q) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(size < 0x3C800000, subnormal, normal)  # 2^-6
    code = tl.where(size > _INFINITY_BITS, 0x7F, code)
    return (code | ((q.to(tl.int32, bitcast=True) >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _decode(code, E5M2: tl.constexpr):
    """Return the float32 values of FP8 bytes."""
    if E5M2:
        value = (code.to(tl.uint16) << 8).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        size = (code & 0x7F).to(tl.int32)
        value = tl.where(size == 0x7F, float("nan"), (size << 20).to(tl.float32, bitcast=True) * _REBIAS)
        value = tl.where(code > 0x7F, -value, value)
    return value


@triton.jit(do_not_specialize=["rows", "padded_rows"])
def quantize_regions(
    x,
    payload,
    scales,
    rows,
    cols,
    padded_rows,
    padded_cols,
    x_stride,
    scale_stride_row,
    scale_stride_col,
    G: tl.constexpr,
    MX: tl.constexpr,
    TILED: tl.constexpr,
    CAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Quantize with one scale for each G columns of a row, reading x once."""
    row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None].to(tl.int64)
    col = (tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
    inside = (row < rows) & (col < cols)
    value = _float32(tl.load(x + row * x_stride + col, mask=inside, other=0.0))
    regions = tl.reshape(value, [BLOCK_M, BLOCK_K // G, G])
    scale = _scale(tl.max(_magnitude(regions), 2), MX)
    code = tl.reshape(_payload(regions, scale[:, :, None], CAST), [BLOCK_M, BLOCK_K])
    stored = (row < padded_rows) & (col < padded_cols)
    tl.store(payload + row * padded_cols + col, tl.where(inside, code, 0), mask=stored)

    group = (tl.program_id(1) * (BLOCK_K // G) + tl.arange(0, BLOCK_K // G))[None, :]
    stored = (row < padded_rows) & (group * G < padded_cols)
    if MX:
        scale = (scale.to(tl.int32, bitcast=True) >> 23).to(tl.uint8)
    if TILED:  # the order of fp8pack.numerics.swizzle
        tile = (row // 128) * tl.cdiv(padded_cols, 4 * G) + group // 4
        place = tile * 512 + (row % 32) * 16 + (row % 128) // 32 * 4 + group % 4
    else:
        place = row * scale_stride_row + group * scale_stride_col
    tl.store(scales + place, scale, mask=stored)


@triton.jit(do_not_specialize=["rows"])
def quantize_long_rows(
    x, payload, scales, rows, cols, padded_cols, x_stride, CAST: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Quantize with one scale per row, for rows too long for one block: the second read comes from the cache."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK_K)
    end = tl.where(row < rows, cols, 0)  # a row of padding has no columns
    amax = tl.full([BLOCK_K], 0, tl.int32)
    for start in range(0, end, BLOCK_K):
        value = _float32(tl.load(x + row * x_stride + start + lane, mask=start + lane < end, other=0.0))
        amax = tl.maximum(amax, _magnitude(value))
    scale = _scale(tl.max(amax, 0), False)
    tl.store(scales + row, scale)
    for start in range(0, padded_cols, BLOCK_K):
        col = start + lane
        value = _float32(tl.load(x + row * x_stride + col, mask=col < end, other=0.0))
        code = tl.where(col < end, _payload(value, scale, CAST), 0)
        tl.store(payload + row * padded_cols + col, code, mask=col < padded_cols)


@triton.jit(do_not_specialize=["rows"])
def find_amax(x, amax, rows, cols, x_stride, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Raise amax, bits in an int32, to the largest magnitude of x; deterministic in any order."""
    row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None].to(tl.int64)
    col = (tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
    value = _float32(tl.load(x + row * x_stride + col, mask=(row < rows) & (col < cols), other=0.0))
    tl.atomic_max(amax, tl.max(tl.max(_magnitude(value), 1), 0), sem="relaxed")


@triton.jit(do_not_specialize=["rows", "padded_rows"])
def quantize_tensor(
    x,
    payload,
    scale,
    amax,
    rows,
    cols,
    padded_rows,
    padded_cols,
    x_stride,
    CAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Quantize with one scale: the given one if amax is None, else the one of amax, which is stored."""
    if amax is None:
        factor = tl.load(scale)
    else:
        factor = _scale(tl.load(amax), False)
        tl.store(scale, factor, mask=tl.program_id(0) + tl.program_id(1) == 0)
    row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None].to(tl.int64)
    col = (tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
    inside = (row < rows) & (col < cols)
    value = _float32(tl.load(x + row * x_stride + col, mask=inside, other=0.0))
    code = tl.where(inside, _payload(value, factor, CAST), 0)
    tl.store(payload + row * padded_cols + col, code, mask=(row < padded_rows) & (col < padded_cols))


@triton.jit
def _operand(block, OPERAND: tl.constexpr, E5M2: tl.constexpr):
    """Return a block for tl.dot, exactly: unchanged if OPERAND is None, else in that type."""
    if OPERAND is not None:
        if block.dtype == tl.uint8:
            block = _decode(block, E5M2)
        elif tl.float32 == OPERAND:
            block = _float32(block)
        block = block.to(OPERAND)
    return block


@triton.jit
def _factors(a_scale, b_scale, start, a_step, b_step, A_COLS: tl.constexpr, B_COLS: tl.constexpr):
    """Return the scales of a block of the result at column `start` of K, [BLOCK_M, BLOCK_N] or 1 for either."""
    factor = tl.load(b_scale + start // B_COLS * b_step)[None, :]
    if a_scale is not None:
        factor = tl.load(a_scale + start // A_COLS * a_step)[:, None] * factor
    return factor


@triton.jit(do_not_specialize=["m"])
def multiply(
    a,
    a_scale,
    b,
    b_scale,
    bias,
    out,
    m,
    n,
    k,
    a_stride,
    b_stride,
    a_scale_row,
    a_scale_col,
    b_scale_row,
    b_scale_col,
    A_COLS: tl.constexpr,
    B_ROWS: tl.constexpr,
    B_COLS: tl.constexpr,
    ALONG_K: tl.constexpr,
    OPERAND: tl.constexpr,
    E5M2: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """out[M, N] = (a * a_scale) @ (b * b_scale)^T + bias; a step of K never crosses a region of scales."""
    tiles_m = tl.cdiv(m, BLOCK_M)
    tiles_n = tl.cdiv(n, BLOCK_N)
    pid = tl.program_id(0)
    tile_m, tile_n = tl.swizzle2d(pid // tiles_n, pid % tiles_n, tiles_m, tiles_n, GROUP_M)
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    # Beyond the edge the last row is read again and its result is not stored: no mask in the loop.
    a_row = tl.minimum(row, m - 1).to(tl.int64)
    b_row = tl.minimum(col, n - 1).to(tl.int64)
    a += a_row[:, None] * a_stride + depth[None, :]
    b += b_row[None, :] * b_stride + depth[:, None]
    if a_scale is not None:
        a_scale += a_row * a_scale_row
    if B_ROWS % BLOCK_N == 0:  # one scale for the whole block: fewer multiplications
        b_scale += tl.full([1], tile_n * BLOCK_N // B_ROWS, tl.int64) * b_scale_row
    else:
        b_scale += b_row // B_ROWS * b_scale_row

    total = tl.full([BLOCK_M, BLOCK_N], 0.0, tl.float32)
    for start in range(0, k, BLOCK_K):
        if EVEN_K:
            x = _operand(tl.load(a), OPERAND, False)
            w = _operand(tl.load(b), OPERAND, E5M2)
        else:
            x = _operand(tl.load(a, mask=depth[None, :] < k - start, other=0.0), OPERAND, False)
            w = _operand(tl.load(b, mask=depth[:, None] < k - start, other=0.0), OPERAND, E5M2)
        # Hopper accumulates FP8 products in about 14 bits: so every step is added in float32.
        if ALONG_K:
            factor = _factors(a_scale, b_scale, start, a_scale_col, b_scale_col, A_COLS, B_COLS)
            total += tl.dot(x, w, input_precision="ieee", max_num_imprecise_acc=BLOCK_K) * factor
        else:
            total = tl.dot(x, w, total, input_precision="ieee", max_num_imprecise_acc=BLOCK_K)
        a += BLOCK_K
        b += BLOCK_K

    if not ALONG_K:
        total *= _factors(a_scale, b_scale, 0, a_scale_col, b_scale_col, A_COLS, B_COLS)
    if bias is not None:
        total += _float32(tl.load(bias + b_row))[None, :]
    place = out + row[:, None].to(tl.int64) * n + col[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=(row < m)[:, None] & (col < n)[None, :])
