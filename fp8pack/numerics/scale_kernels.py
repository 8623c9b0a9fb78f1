"""The CPU kernel of the search for scales, in Numba: what each candidate of a scale costs its region."""

from typing import Literal

import numpy as np
from numba import carray, cfunc, njit, types

from fp8pack.numerics.kernels import _encode, _self_contained, _widen

_inline = njit(nogil=True, error_model="numpy")


@_inline
def _scale_errors(weight, scales, errors, values, factors, steps, rows, cols, kind, target):
    (n, k), count = weight.shape, steps.size
    for r in range(n):
        for j in range(scales.shape[1]):
            for t in range(count):
                steps[t] = scales[r // rows, j] * factors[t]
            sums = errors[r // rows, j]
            for c in range(j * cols, min(k, (j + 1) * cols)):
                x = _widen(weight[r, c], kind)
                for t in range(count):
                    error = np.float64(x - values[_encode(x, steps[t], target)] * steps[t])
                    sums[t] += error * error


def compile_scale_errors(bits: Literal["uint16", "uint32"]) -> str:
    """Return LLVM IR of the kernel for weights of these raw bits, optimised for this processor.

    It defines a C function, with pointers to contiguous arrays:
        void fp8pack_scale_errors(weight, scales, errors, values, factors, steps, n, k, rows, cols, kind, count, max,
                                  smallest, addend, shift)
    """
    u, p, i, f, w = getattr(types, bits), types.CPointer, types.int64, types.float32, types.uint32

    @cfunc(types.void(p(u), p(f), p(types.float64), p(f), p(f), p(f), *[i] * 6, f, w, w, w), error_model="numpy")
    def scale_errors(weight, scales, errors, values, factors, steps, n, k, rows, cols, kind, count,
                     largest, smallest, addend, shift):  # fmt: skip
        grid, target = ((n + rows - 1) // rows, (k + cols - 1) // cols), (largest, 0, smallest, addend, shift)
        arrays = (carray(weight, (n, k)), carray(scales, grid), carray(errors, (grid[0], grid[1], count)))
        others = (carray(values, (256,)), carray(factors, (count,)), carray(steps, (count,)))
        _scale_errors(arrays[0], arrays[1], arrays[2], others[0], others[1], others[2], rows, cols, kind, target)

    return str(_self_contained(scale_errors, "fp8pack_scale_errors"))
