"""The CPU kernels, in Numba: one pass over cache-warm rows from BF16, FP16 or FP32 to FP8 bytes and scales.

Legend: weight [N, K] arrives as its raw bits, uint16 (BF16, FP16) or uint32 (FP32); one scale serves a region of
R x C elements; payload [N, K] uint8; scales [ceil(N/R), ceil(K/C)] float32; scratch holds three rows of K values.

    amax   the largest magnitude of the region: for these formats the largest integer once the sign is masked off
    scale  max(amax / max, 2^-126), rounded as asked; 1.0 for a region of zeros
    code   RNE(min(|x| / scale, max)), by true float32 division, with the sign of x

And back: weight = payload * scale in float32, rounded once to BF16 (RNE) if the weight is uint16.

`error_model="numpy"` drops Python's check for division by zero, which would keep LLVM from vectorising. There is no
fast-math where bytes are made; the sums of `_compare` alone may be taken in any order, or they would not vectorise.
Integer casts look redundant and are not: Numba widens uint16 and uint32 arithmetic to 64 bits, and each cast narrows it
again, which is what lets 16 lanes fit a 512-bit register.

Nobody calls these functions as they stand: `native.py` has them compiled by `compile_kernels`, once on a machine, and
loads the machine code without importing Numba. Proof of the bytes: tests/numerics/test_kernels.py, against ml_dtypes
and against torch.
"""

import re
from typing import Any, Literal

import llvmlite.binding as llvm
import numpy as np
from numba import carray, cfunc, njit, types
from numba.extending import intrinsic

from fp8pack.numerics.scaling import MIN_SCALE

BF16, F16, F32 = 0, 1, 2  # kinds of weight
ROUND_UP, ROUND_FLOOR = 1, 2

_inline = njit(nogil=True, error_model="numpy")
_sums = njit(nogil=True, error_model="numpy", fastmath={"reassoc"})


@intrinsic
def _bits(context: Any, value: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(types.uint32))

    return types.uint32(types.float32), build


@intrinsic
def _float(context: Any, value: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(types.float32))

    return types.float32(types.uint32), build


@intrinsic
def _shift_right(context: Any, value: Any, amount: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.lshr(args[0], args[1])

    return types.uint32(types.uint32, types.uint32), build


@intrinsic
def _shift_left(context: Any, value: Any, amount: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.shl(args[0], args[1])

    return types.uint32(types.uint32, types.uint32), build


@_inline
def _widen(bits, kind):
    if kind == BF16:
        return _float(np.uint32(np.uint32(bits) << np.uint32(16)))
    if kind == F16:
        half = np.uint32(bits)
        magnitude = np.uint32(np.uint32(half & np.uint32(0x7FFF)) << np.uint32(13))
        sign = np.uint32(np.uint32(half & np.uint32(0x8000)) << np.uint32(16))
        rescaled = _float(magnitude) * np.float32(2.0**112)  # exact, subnormals included
        return _float(np.uint32(_bits(rescaled) | sign))
    return _float(np.uint32(bits))


@_inline
def _widen_row(row, kind, values):
    if kind == F16:
        for c in range(row.size):
            values[c] = _widen(row[c], F16)
    else:
        for c in range(row.size):
            values[c] = _widen(row[c], F32)


@_inline
def _scale_of(amax, target):
    largest, emax, rounding = target[0], target[1], target[5]
    if amax == np.float32(0):
        return np.float32(1)
    scale = max(np.float32(amax / largest), np.float32(MIN_SCALE))
    if rounding == ROUND_UP:
        bits = _bits(scale)
        scale = _float(np.uint32(np.uint32(bits + np.uint32(0x7FFFFF)) & np.uint32(0x7F800000)))
    elif rounding == ROUND_FLOOR:
        exponent = np.int32(_bits(amax) >> np.uint32(23)) - np.int32(emax)
        scale = _float(np.uint32(np.uint32(max(exponent, np.int32(1))) << np.uint32(23)))
    return scale


@_inline
def _encode(x, scale, target):
    bits = _bits(x)
    magnitude = min(_float(np.uint32(bits & np.uint32(0x7FFFFFFF))) / scale, target[0])
    exponent = max(np.uint32(_bits(magnitude) & np.uint32(0x7F800000)), target[2])
    total = _bits(magnitude + _float(np.uint32(exponent + target[3])))
    code = np.uint32(total + _shift_right(exponent, target[4]))
    return np.uint8(np.uint32(code | np.uint32(np.uint32(bits >> np.uint32(24)) & np.uint32(0x80))))


@_inline
def _peaks(weight, lo, hi, mask, peaks):
    first = weight[lo]
    for k in range(first.size):
        peaks[k] = peaks.dtype.type(first[k] & mask)
    for r in range(lo + 1, hi):
        row = weight[r]
        for k in range(row.size):
            magnitude = peaks.dtype.type(row[k] & mask)
            peaks[k] = magnitude if magnitude > peaks[k] else peaks[k]


@_inline
def _largest(values):
    found = values[0]
    for k in range(1, values.size):
        found = values[k] if values[k] > found else found
    return found


@_inline
def _quantize(weight, payload, scales, scratch, rows, cols, kind, mask, infinity, target):
    n, k = weight.shape
    peaks, row_scales, values = scratch
    largest = weight.dtype.type(0)
    for i in range((n + rows - 1) // rows):
        lo, hi = i * rows, min(n, (i + 1) * rows)
        _peaks(weight, lo, hi, mask, peaks)
        for j in range((k + cols - 1) // cols):
            begin, end = j * cols, min(k, (j + 1) * cols)
            peak = _largest(peaks[begin:end])
            largest = peak if peak > largest else largest
            if not target[6]:
                scales[i, j] = _scale_of(_widen(peak, kind), target)
            row_scales[begin:end] = scales[i, j]
        for r in range(lo, hi):
            source, codes = weight[r], payload[r]
            if kind == BF16:  # the common case needs no row of values in between: 9.6 GB/s against 8.4
                for c in range(k):
                    codes[c] = _encode(_widen(source[c], BF16), row_scales[c], target)
            else:
                _widen_row(source, kind, values)
                for c in range(k):
                    codes[c] = _encode(values[c], row_scales[c], target)
    return _widen(largest, kind) if largest < infinity else np.float32(np.nan)


@_inline
def _dequantize(payload, scales, weight, row_scales, rows, cols, top, left, kind, target):
    shift, widening = target[0], target[1]
    largest, most = np.uint8(0), np.uint32(0)
    n, k = weight.shape
    spread = -1
    for r in range(n):
        if (r + top) // rows != spread:
            spread = (r + top) // rows
            for j in range(scales.shape[1]):
                row_scales[max(0, j * cols - left) : min(k, (j + 1) * cols - left)] = scales[spread, j]
        codes, out = payload[r], weight[r]
        for c in range(k):
            magnitude = np.uint8(codes[c] & np.uint8(0x7F))
            largest = magnitude if magnitude > largest else largest
        for c in range(k):
            code = np.uint32(codes[c])
            magnitude = _shift_left(np.uint32(code & np.uint32(0x7F)), shift)
            bits = _bits(
                _float(magnitude) * widening * row_scales[c]
            )  # the first product is exact, subnormals included
            most = bits if bits > most else most
            bits = np.uint32(bits | np.uint32(np.uint32(code & np.uint32(0x80)) << np.uint32(24)))
            if kind == BF16:
                odd = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
                bits = np.uint32(np.uint32(np.uint32(bits + np.uint32(0x7FFF)) + odd) >> np.uint32(16))
            out[c] = bits
    return _float(most) if largest <= target[2] else np.float32(np.nan)


@_inline
def _largest_codes(payload, largest, rows, cols, top, left):
    n, k = payload.shape
    for r in range(n):
        codes, found = payload[r], largest[(r + top) // rows]
        for j in range(found.size):
            part = codes[max(0, j * cols - left) : min(k, (j + 1) * cols - left)]
            most = np.uint8(0)
            for c in range(part.size):
                magnitude = np.uint8(part[c] & np.uint8(0x7F))
                most = magnitude if magnitude > most else most
            found[j] = most if most > found[j] else found[j]


@_inline
def _observe(values, prompts, channel_amax, channel_squares, histogram, prompt_amax, begin, end):
    least, most = np.uint16(0xFFFF), np.uint16(0)
    for r in range(values.shape[0]):
        prompt = prompts[r]
        if prompt < 0:
            continue
        row, peaks, squares = values[r, begin:end], channel_amax[begin:end], channel_squares[begin:end]
        largest = np.uint16(0)
        for c in range(row.size):
            magnitude = np.uint16(row[c] & np.uint16(0x7FFF))
            peaks[c] = magnitude if magnitude > peaks[c] else peaks[c]
            largest = magnitude if magnitude > largest else largest
            below = np.uint16(magnitude - np.uint16(1))  # zero wraps round and is never the least
            least = below if below < least else least
        for c in range(row.size):
            value = np.float64(_widen(row[c], BF16))
            squares[c] += value * value
        for c in range(row.size):
            histogram[row[c] & np.uint16(0x7FFF)] += 1
        prompt_amax[prompt] = largest if largest > prompt_amax[prompt] else prompt_amax[prompt]
        most = largest if largest > most else most
    return ((np.int64(least) + 1) << 32) | np.int64(most)


@_inline
def _widen_all(source, kind, values):
    if kind == BF16:
        for c in range(source.size):
            values[c] = _widen(source[c], BF16)
    else:
        _widen_row(source, kind, values)


@_sums
def _compare(exact, approximate, codes, values, kind, tiny, most, beyond, sums, counts):
    for begin in range(0, exact.size, values.size):
        end = min(begin + values.size, exact.size)
        found, payload = approximate[begin:end], codes[begin:end]
        _widen_all(exact[begin:end], kind, values)
        signal = energy = noise = relative = 0.0
        worst, peak = np.uint32(0), np.uint32(0)
        nonzero = nonfinite = flushed = subnormal = saturated = 0
        for c in range(found.size):
            x, q = np.float64(values[c]), np.float64(found[c])
            error = np.float64(np.float32(values[c] - found[c]))
            signal += x * x
            energy += q * q
            noise += error * error
        for c in range(found.size):
            x, q = (
                np.uint32(_bits(values[c]) & np.uint32(0x7FFFFFFF)),
                np.uint32(_bits(found[c]) & np.uint32(0x7FFFFFFF)),
            )
            size, distance = _float(x), np.uint32(_bits(np.float32(values[c] - found[c])) & np.uint32(0x7FFFFFFF))
            share = np.float32(_float(distance) / size) if x != 0 else np.float32(0)
            relative += np.float64(share)
            worst = _bits(share) if _bits(share) > worst else worst
            peak = x if x > peak else peak
            nonzero += 1 if x != 0 else 0
            nonfinite += 1 if x >= np.uint32(0x7F800000) or q >= np.uint32(0x7F800000) else 0
            flushed += 1 if x != 0 and q == 0 else 0
        for c in range(found.size):
            code = np.uint8(payload[c] & np.uint8(0x7F))
            subnormal += 1 if code != 0 and code < tiny else 0
            x, q = np.float32(abs(values[c])), np.float32(abs(found[c]))
            saturated += 1 if code == most and x > np.float32(q * beyond) else 0
        sums[0] += signal
        sums[1] += energy
        sums[2] += noise
        sums[3] += relative
        sums[4] = max(sums[4], np.float64(_float(worst)))
        sums[5] = max(sums[5], np.float64(_float(peak)))
        counts[0] += nonzero
        counts[1] += nonfinite
        counts[2] += flushed
        counts[3] += subnormal
        counts[4] += saturated


def compile_kernels(bits: Literal["uint16", "uint32"]) -> str:
    """Return LLVM IR of the kernels for weights of these raw bits, optimised for this processor.

    It defines four C functions, with pointers to contiguous arrays:
        float fp8pack_quantize(weight, payload, scales, peaks, row_scales, values, n, k, rows, cols, kind, mask,
                               infinity, max, emax, smallest, addend, shift, rounding, fixed)
        float fp8pack_amax(weight, peaks, n, k, kind, mask, infinity)
        float fp8pack_dequantize(payload, scales, weight, row_scales, n, k, scale_rows, scale_cols, rows, cols, top,
                                 left, kind, shift, widening, largest)
        void fp8pack_largest_codes(payload, largest, n, k, scale_rows, scale_cols, rows, cols, top, left)
    """
    u, p = getattr(types, bits), types.CPointer
    f, i, w = types.float32, types.int64, types.uint32
    grid = (i, i, i, i)

    @cfunc(f(p(u), p(types.uint8), p(f), p(u), p(f), p(f), *grid, i, u, u, f, i, w, w, w, i, i), error_model="numpy")
    def quantize(weight, payload, scales, peaks, row_scales, values, n, k, rows, cols, kind, mask, infinity,
                 largest, emax, smallest, addend, shift, rounding, fixed):  # fmt: skip
        shape = ((n + rows - 1) // rows, (k + cols - 1) // cols)
        scratch = (carray(peaks, (k,)), carray(row_scales, (k,)), carray(values, (k,)))
        target = (largest, emax, smallest, addend, shift, rounding, fixed)
        arrays = (carray(weight, (n, k)), carray(payload, (n, k)), carray(scales, shape))
        return _quantize(arrays[0], arrays[1], arrays[2], scratch, rows, cols, kind, mask, infinity, target)

    @cfunc(f(p(u), p(u), i, i, i, u, u), error_model="numpy")
    def amax(weight, peaks, n, k, kind, mask, infinity):
        row = carray(peaks, (k,))
        _peaks(carray(weight, (n, k)), 0, n, mask, row)
        peak = _largest(row)
        return _widen(peak, kind) if peak < infinity else np.float32(np.nan)

    @cfunc(f(p(types.uint8), p(f), p(u), p(f), *grid, i, i, i, i, i, w, f, w), error_model="numpy")
    def dequantize(payload, scales, weight, row_scales, n, k, scale_rows, scale_cols, rows, cols, top, left, kind,
                   shift, widening, largest):  # fmt: skip
        arrays = (carray(payload, (n, k)), carray(scales, (scale_rows, scale_cols)), carray(weight, (n, k)))
        target = (shift, widening, largest)
        return _dequantize(
            arrays[0], arrays[1], arrays[2], carray(row_scales, (k,)), rows, cols, top, left, kind, target
        )

    @cfunc(types.void(p(types.uint8), p(types.uint8), *grid, i, i, i, i), error_model="numpy")
    def largest_codes(payload, largest, n, k, scale_rows, scale_cols, rows, cols, top, left):
        _largest_codes(carray(payload, (n, k)), carray(largest, (scale_rows, scale_cols)), rows, cols, top, left)

    module = _self_contained(quantize, "fp8pack_quantize")
    module.link_in(_self_contained(amax, "fp8pack_amax"))
    module.link_in(_self_contained(dequantize, "fp8pack_dequantize"))
    module.link_in(_self_contained(largest_codes, "fp8pack_largest_codes"))
    return str(module)


def compile_observer() -> str:
    """Return LLVM IR of the kernel that records activations, optimised for this processor.

    It defines a C function, with pointers to contiguous arrays, for the columns from `begin` to `end`:
        int64_t fp8pack_observe(values, prompts, channel_amax, channel_squares, histogram, prompt_amax,
                                n, k, num_prompts, begin, end)
    """
    u, d, i, p = types.uint16, types.float64, types.int64, types.CPointer

    @cfunc(i(p(u), p(types.int32), p(u), p(d), p(i), p(u), i, i, i, i, i), error_model="numpy")
    def observe(values, prompts, channel_amax, channel_squares, histogram, prompt_amax, n, k, num_prompts, begin, end):
        channels = (carray(channel_amax, (k,)), carray(channel_squares, (k,)))
        counts = (carray(histogram, (32768,)), carray(prompt_amax, (num_prompts,)))
        rows = (carray(values, (n, k)), carray(prompts, (n,)))
        return _observe(rows[0], rows[1], channels[0], channels[1], counts[0], counts[1], begin, end)

    return str(_self_contained(observe, "fp8pack_observe"))


def compile_comparison(bits: Literal["uint16", "uint32"]) -> str:
    """Return LLVM IR of the kernel that compares weights of these raw bits with others, optimised for this processor.

    It defines a C function, with pointers to contiguous arrays; sums and counts are added to:
        void fp8pack_compare(exact, approximate, codes, values, sums, counts, n, chunk, kind, tiny, most, beyond)
    """
    u, p, i = getattr(types, bits), types.CPointer, types.int64
    f, d, b = types.float32, types.float64, types.uint8

    @cfunc(types.void(p(u), p(f), p(b), p(f), p(d), p(i), i, i, i, b, b, f), error_model="numpy")
    def compare(exact, approximate, codes, values, sums, counts, n, chunk, kind, tiny, most, beyond):
        arrays = (carray(exact, (n,)), carray(approximate, (n,)), carray(codes, (n,)), carray(values, (chunk,)))
        found = (carray(sums, (6,)), carray(counts, (5,)))
        _compare(arrays[0], arrays[1], arrays[2], arrays[3], kind, tiny, most, beyond, found[0], found[1])

    return str(_self_contained(compare, "fp8pack_compare"))


def _self_contained(function: Any, name: str) -> llvm.ModuleRef:
    """The IR of a C function under a plain name, without Numba's own helpers.

    Numba links in what raises Python exceptions and frees arrays. Nothing here raises or owns memory, so that code is
    never reached; declared unreachable, it leaves an object file that needs neither Numba nor Python.
    Raises:
        ValueError: it calls anything else, such as a function of the C library.
    """
    ir = function.inspect_llvm().replace(function.native_name, name)
    unreachable = r"define internal \1 {\n  unreachable\n}"
    helpers = r"^declare ([^@]*@(?:NRT_|Py|numba_)\w+\([^)]*\))[^\n]*$"
    ir = re.sub(helpers, unreachable, ir, flags=re.MULTILINE)
    if others := re.findall(r"^declare [^@]*@(?!llvm\.)([\w.]+)\(", ir, flags=re.MULTILINE):
        raise ValueError(f"{name} calls {', '.join(others)}")
    ir = re.sub(
        r"^(@PyExc_\w+) = external (?:local_unnamed_addr )?global (\S+).*$",
        r"\1 = internal global \2 zeroinitializer",
        ir,
        flags=re.MULTILINE,
    )
    return llvm.parse_assembly(ir)
