"""The CPU kernels of compensated rounding, in Numba, float64: X^T X, its factor, and rounding with feedback.

Everything here is a sum of products into a row of values, `_add_products`, which adds its terms in the order of their
index, each product rounded on its own: no fused multiply-add, no fast-math, no BLAS. So results do not depend on tiles,
threads or processors. Tiles only keep what is read again in the cache.

Legend: second moments H [B, S, S] of inputs in B blocks of S channels; gains G [B, S, S] in the order [B, S] in which
channels are rounded; weight [N, K] as raw bits; sums and errors [S, LANES] of rows that are rounded side by side.
"""

from typing import Any, Literal

import numpy as np
from numba import carray, cfunc, njit, types
from numba.extending import intrinsic

from fp8pack.numerics.kernels import BF16, _encode, _self_contained, _widen
from fp8pack.numerics.tiles import LANES, TILE

_inline = njit(nogil=True, error_model="numpy")


@intrinsic
def _sqrt(context: Any, value: Any) -> Any:
    """The processor's own square root, which IEEE 754 rounds correctly; Numba's calls the C library."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        root = builder.module.declare_intrinsic("llvm.sqrt", [args[0].type])
        return builder.call(root, [args[0]])

    return types.float64(types.float64), build


@_inline
def _add_products(out, factors, rows):
    """out [C] += factors [J] @ rows [J, C]; the sum runs over J in order."""
    j, size = 0, out.size
    while j + 4 <= factors.size:
        a, b, c, d = factors[j], factors[j + 1], factors[j + 2], factors[j + 3]
        first, second, third, fourth = rows[j], rows[j + 1], rows[j + 2], rows[j + 3]
        for k in range(size):
            out[k] = (((out[k] + a * first[k]) + b * second[k]) + c * third[k]) + d * fourth[k]
        j += 4
    while j < factors.size:
        a, first = factors[j], rows[j]
        for k in range(size):
            out[k] += a * first[k]
        j += 1


@_inline
def _add_moments(values, prompts, moments, chosen, columns):
    """moments [B, S, S] += X^T X of the rows of values [T, K] whose prompt is not negative; upper triangles alone."""
    (n, k), (count, size, _) = values.shape, moments.shape
    for begin in range(0, n, TILE):
        for block in range(count):
            first = block * size
            width, kept = min(size, k - first), 0
            for r in range(begin, min(n, begin + TILE)):
                if prompts[r] < 0:
                    continue
                for c in range(width):
                    value = np.float64(_widen(values[r, first + c], BF16))
                    chosen[kept, c] = value
                    columns[c, kept] = value
                kept += 1
            for c in range(width):
                _add_products(moments[block, c, c:width], columns[c, :kept], chosen[:kept, c:width])


@_inline
def _factor(matrix, panel):
    """Replace the upper triangle of H [S, S] by R with R R^T = H; return False if H is not positive definite.

    panel [LANES, S] takes the columns of R that are ready, negated, one in a row.
    """
    end = matrix.shape[0]
    while end > 0:
        begin = max(0, end - LANES)
        count = end - begin
        for j in range(end - 1, begin - 1, -1):  # row `end - 1 - j` of the panel, so that rows are in order of use
            used = end - 1 - j
            for i in range(j + 1):
                for p in range(used):
                    matrix[i, j] += matrix[i, end - 1 - p] * panel[p, j]
            if not matrix[j, j] > 0:
                return False
            root = _sqrt(matrix[j, j])
            matrix[j, j] = root
            panel[used, j] = -root
            for i in range(j):
                matrix[i, j] /= root
                panel[used, i] = -matrix[i, j]
        for left in range(0, begin, TILE):
            right = min(begin, left + TILE)
            for i in range(right):
                k = max(i, left)
                _add_products(matrix[i, k:right], matrix[i, begin:end][::-1], panel[:count, k:right])
        end = begin
    return True


@_inline
def _read_columns(weight, payload, scales, columns, place, region, kind, values, state):
    """Columns of rows of a weight, one after the other: their values, their scales, and the errors of their codes."""
    exact, spread, _, errors = state
    for i in range(columns.size):
        c = place[1] + columns[i]
        for r in range(exact.shape[1]):
            row = place[0] + r
            scale = scales[row // region[0], c // region[1]]
            exact[i, r], spread[i, r] = np.float64(_widen(weight[row, c], kind)), scale
            errors[i, r] = exact[i, r] - np.float64(np.float32(values[payload[row, c]] * scale))


@_inline
def _round_columns(payload, columns, gains, place, values, target, state, is_again):
    """Round column i to the FP8 value nearest to w_i + sum over j of G[i, j] (w_j - q_j).

    The first time the sum runs over j < i, again over all others.
    """
    exact, spread, sums, errors = state
    width = columns.size
    for begin in range(0, width, LANES):
        end = min(width, begin + LANES)
        for i in range(begin, end):
            for r in range(exact.shape[1]):
                sums[i, r] = exact[i, r]
        for left in range(0, width if is_again else begin, TILE):
            right = min(width if is_again else begin, left + TILE)
            for i in range(begin, end):
                _add_products(sums[i], gains[i, left : min(right, begin)], errors[left : min(right, begin)])
                _add_products(sums[i], gains[i, max(left, end) : right], errors[max(left, end) : right])
        for i in range(begin, end):
            last = end if is_again else i
            _add_products(sums[i], gains[i, begin:last], errors[begin:last])
            for r in range(exact.shape[1]):
                scale = np.float32(spread[i, r])
                code = _encode(np.float32(sums[i, r]), scale, target)
                payload[place[0] + r, place[1] + columns[i]] = code
                errors[i, r] = exact[i, r] - np.float64(np.float32(values[code] * scale))


@_inline
def _compensate(weight, payload, scales, gains, order, values, scratch, region, kind, target, is_again):
    (n, k), (count, size, _) = weight.shape, gains.shape
    for top in range(0, n, LANES):
        lanes = min(LANES, n - top)
        for block in range(count):
            place, width = (top, block * size), min(size, k - block * size)
            columns = order[block, :width]
            state = (
                scratch[0, :width, :lanes],
                scratch[1, :width, :lanes],
                scratch[2, :width, :lanes],
                scratch[3, :width, :lanes],
            )
            _read_columns(weight, payload, scales, columns, place, region, kind, values, state)
            _round_columns(payload, columns, gains[block], place, values, target, state, is_again)


def compile_moments() -> str:
    """Return LLVM IR of the kernels of second moments, optimised for this processor.

    It defines two C functions, with pointers to contiguous arrays:
        void fp8pack_add_moments(values, prompts, moments, chosen, columns, n, k, blocks, size)
        int64_t fp8pack_factor(matrix, panel, size)
    """
    d, i, p = types.float64, types.int64, types.CPointer

    @cfunc(types.void(p(types.uint16), p(types.int32), p(d), p(d), p(d), i, i, i, i), error_model="numpy")
    def add_moments(values, prompts, moments, chosen, columns, n, k, blocks, size):
        rows, scratch = (carray(values, (n, k)), carray(prompts, (n,))), (TILE, size)
        both = (carray(chosen, scratch), carray(columns, (size, TILE)))
        _add_moments(rows[0], rows[1], carray(moments, (blocks, size, size)), both[0], both[1])

    @cfunc(i(p(d), p(d), i), error_model="numpy")
    def factor(matrix, panel, size):
        return 1 if _factor(carray(matrix, (size, size)), carray(panel, (LANES, size))) else 0

    module = _self_contained(add_moments, "fp8pack_add_moments")
    module.link_in(_self_contained(factor, "fp8pack_factor"))
    return str(module)


def compile_compensation(bits: Literal["uint16", "uint32"]) -> str:
    """Return LLVM IR of the kernel that rounds weights of these raw bits, optimised for this processor.

    It defines a C function, with pointers to contiguous arrays:
        void fp8pack_compensate(weight, payload, scales, gains, order, values, scratch, n, k, blocks, size, rows,
                                cols, kind, is_again, max, smallest, addend, shift)
    """
    u, p, i, f, w = getattr(types, bits), types.CPointer, types.int64, types.float32, types.uint32
    d, b = types.float64, types.uint8

    @cfunc(types.void(p(u), p(b), p(f), p(d), p(i), p(f), p(d), *[i] * 8, f, w, w, w), error_model="numpy")
    def compensate(weight, payload, scales, gains, order, values, scratch, n, k, blocks, size, rows, cols, kind,
                   is_again, largest, smallest, addend, shift):  # fmt: skip
        shape = ((n + rows - 1) // rows, (k + cols - 1) // cols)
        arrays = (carray(weight, (n, k)), carray(payload, (n, k)), carray(scales, shape))
        feedback = (carray(gains, (blocks, size, size)), carray(order, (blocks, size)))
        table, target = carray(values, (256,)), (largest, 0, smallest, addend, shift)
        _compensate(arrays[0], arrays[1], arrays[2], feedback[0], feedback[1], table,
                    carray(scratch, (4, size, LANES)), (rows, cols), kind, target, is_again)  # fmt: skip

    return str(_self_contained(compensate, "fp8pack_compensate"))
