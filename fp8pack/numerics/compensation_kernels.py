"""The CPU kernels of compensated rounding, in Numba, float64: X^T X, its factor, and rounding with feedback.

Everything here is a sum of products, `_multiply_add`, which adds the terms of each value in the order of their index,
every product rounded on its own: no fused multiply-add, no fast-math, no BLAS. So results do not depend on tiles,
threads or processors. Tiles only keep what is read again in registers and in the cache.

Legend: second moments H [B, S, S] of inputs in B blocks of S channels; gains G [B, S, S] in the order [B, S] in which
channels are rounded; weight [N, K] as raw bits; sums and errors [S, LANES] of rows that are rounded side by side.
"""

from typing import Any, Literal

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from fp8pack.numerics.kernels import BF16, _encode, _self_contained, _widen
from fp8pack.numerics.tiles import LANES, TILE, TILE_COLS, TILE_ROWS

_inline = njit(nogil=True, error_model="numpy")


@intrinsic
def _sqrt(context: Any, value: Any) -> Any:
    """The processor's own square root, which IEEE 754 rounds correctly; Numba's calls the C library."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        root = builder.module.declare_intrinsic("llvm.sqrt", [args[0].type])
        return builder.call(root, [args[0]])

    return types.float64(types.float64), build


@intrinsic
def _add_tile(context: Any, out: Any, factors: Any, rows: Any, count: Any) -> Any:
    """out [TILE_ROWS, TILE_COLS] += factors [TILE_ROWS, J] @ rows [J, TILE_COLS], with the sums in registers."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> None:
        kind, word = ir.VectorType(ir.DoubleType(), TILE_COLS), ir.IntType(64)
        nothing, lanes = ir.Constant(kind, ir.Undefined), ir.Constant(ir.VectorType(ir.IntType(32), TILE_COLS), None)
        arrays = [context.make_array(t)(context, builder, a) for t, a in zip(signature.args[:3], args[:3], strict=True)]
        steps = [cgutils.unpack_tuple(builder, array.strides) for array in arrays]
        bases = [builder.ptrtoint(array.data, word) for array in arrays]

        def pointer(which: int, row: Any, column: Any, to: Any) -> Any:
            offset = builder.add(builder.mul(row, steps[which][0]), builder.mul(column, steps[which][1]))
            return builder.inttoptr(builder.add(bases[which], offset), to.as_pointer())

        def load(which: int, row: Any, column: Any, to: Any) -> Any:
            found = builder.load(pointer(which, row, column, to))
            found.align = 8
            return found

        first, places = ir.Constant(word, 0), [ir.Constant(word, i) for i in range(TILE_ROWS)]
        sums = [cgutils.alloca_once_value(builder, load(0, place, first, kind)) for place in places]
        with cgutils.for_range(builder, args[3]) as loop:
            row = load(2, loop.index, first, kind)
            for place, total in zip(places, sums, strict=True):
                factor = load(1, place, loop.index, ir.DoubleType())
                one = builder.insert_element(nothing, factor, ir.Constant(ir.IntType(32), 0))
                product = builder.fmul(builder.shuffle_vector(one, nothing, lanes), row)
                builder.store(builder.fadd(builder.load(total), product), total)
        for place, total in zip(places, sums, strict=True):
            builder.store(builder.load(total), pointer(0, place, first, kind)).align = 8

    return types.void(out, factors, rows, types.int64), build


@_inline
def _multiply_add(out, factors, rows):
    """out [R, C] += factors [R, J] @ rows [J, C]; every sum runs over J in order."""
    height, width, count = out.shape[0], out.shape[1], rows.shape[0]
    bottom, right = height - height % TILE_ROWS, width - width % TILE_COLS
    for k in range(0, right, TILE_COLS):
        for i in range(0, bottom, TILE_ROWS):
            _add_tile(out[i:, k:], factors[i:], rows[:, k:], count)
        for i in range(bottom, height):
            _add_row(out[i, k : k + TILE_COLS], factors[i], rows[:, k : k + TILE_COLS])
    if right < width:
        for i in range(height):
            _add_row(out[i, right:], factors[i], rows[:, right:])


@_inline
def _add_row(out, factors, rows):
    for j in range(rows.shape[0]):
        for k in range(out.size):
            out[k] += factors[j] * rows[j, k]


@_inline
def _add_moments(values, prompts, moments, chosen, first, last):
    """moments [B, S, S] += X^T X of the rows of values [T, K] whose prompt is not negative, on and above the diagonal.

    first, last: the rows of moments [B * S, S] to add to. chosen [TILE, S] takes the values of a tile.
    """
    (n, k), size = values.shape, moments.shape[1]
    for begin in range(0, n, TILE):
        for block in range(first // size, (last + size - 1) // size):
            offset = block * size
            width, kept = min(size, k - offset), 0
            top, bottom = max(0, first - offset), min(width, last - offset)
            for r in range(begin, min(n, begin + TILE)):
                if prompts[r] >= 0:
                    for c in range(top, width):
                        chosen[kept, c] = _widen(values[r, offset + c], BF16)
                    kept += 1
            for left in range(top - top % TILE, width, TILE):
                right = min(width, left + TILE)
                for c in range(top, min(bottom, right), TILE_ROWS):
                    e = min(c + TILE_ROWS, bottom, right)
                    skipped = max(top, left, c - (c - left) % TILE_COLS)  # whole tiles, so a little below the diagonal
                    _multiply_add(
                        moments[block, c:e, skipped:right], chosen[:kept, c:e].T, chosen[:kept, skipped:right]
                    )


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
            for i in range(0, right, TILE_ROWS):
                k = max(i, left)
                below = min(i + TILE_ROWS, right)
                _multiply_add(matrix[i:below, k:right], matrix[i:below, begin:end][:, ::-1], panel[:count, k:right])
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
    for begin in range(0, width, TILE_COLS):
        end = min(width, begin + TILE_COLS)
        for i in range(begin, end):
            for r in range(exact.shape[1]):
                sums[i, r] = exact[i, r]
        for left in range(0, width if is_again else begin, TILE):
            right = min(width if is_again else begin, left + TILE)
            a, b = min(right, begin), max(left, end)
            if left < a:
                _multiply_add(sums[begin:end], gains[begin:end, left:a], errors[left:a])
            if b < right:
                _multiply_add(sums[begin:end], gains[begin:end, b:right], errors[b:right])
        for i in range(begin, end):
            last = end if is_again else i
            _add_row(sums[i], gains[i, begin:last], errors[begin:last])
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
        void fp8pack_add_moments(values, prompts, moments, chosen, n, k, blocks, size, first, last)
        int64_t fp8pack_factor(matrix, panel, size)
    """
    d, i, p = types.float64, types.int64, types.CPointer

    @cfunc(types.void(p(types.uint16), p(types.int32), p(d), p(d), *[i] * 6), error_model="numpy")
    def add_moments(values, prompts, moments, chosen, n, k, blocks, size, first, last):
        rows = (carray(values, (n, k)), carray(prompts, (n,)))
        found = (carray(moments, (blocks, size, size)), carray(chosen, (TILE, size)))
        _add_moments(rows[0], rows[1], found[0], found[1], first, last)

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
