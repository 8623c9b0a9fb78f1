"""The CPU kernels: one pass over cache-warm rows from BF16, FP16 or FP32 to FP8 bytes and scales.

Legend: weight [N, K] arrives as its raw bits, uint16 (BF16, FP16) or uint32 (FP32); one scale serves a region of
R x C elements; payload [N, K] uint8; scales [ceil(N/R), ceil(K/C)] float32.

    amax   the largest magnitude of the region: for these formats the largest integer once the sign is masked off
    scale  max(amax / max, 2^-126), rounded as asked; 1.0 for a region of zeros
    code   RNE(min(|x| / scale, max)), by true float32 division, with the sign of x

All kernels stand in this one file because Numba's cache watches only the file of the function that is called. They
are compiled when first called and kept in the cache directory where that can be written. `error_model="numpy"`
drops Python's check for division by zero, which would keep LLVM from vectorising; no fast-math anywhere.
Integer casts look redundant and are not: Numba widens uint16 and uint32 arithmetic to 64 bits, and each cast
narrows it again, which is what lets 16 lanes fit a 512-bit register.
Proof of the bytes: tests/numerics/test_kernels.py, against ml_dtypes and against torch.
"""

from typing import Any, Final

import numpy as np
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from fp8pack.numerics.formats import Float8Format
from fp8pack.numerics.scaling import MIN_SCALE, ScaleRounding

Array = NDArray[Any]

_KIND: Final = {"BF16": 0, "F16": 1, "F32": 2}
_ROUNDING: Final = {ScaleRounding.NONE: 0, ScaleRounding.UP: 1, ScaleRounding.FLOOR: 2}
_SIGN_MASK: Final = {"BF16": np.uint16(0x7FFF), "F16": np.uint16(0x7FFF), "F32": np.uint32(0x7FFFFFFF)}
_INFINITY: Final = {"BF16": np.uint16(0x7F80), "F16": np.uint16(0x7C00), "F32": np.uint32(0x7F800000)}
SOURCE_DTYPES: Final = tuple(_KIND)


def quantize_rows(
    weight: Array, payload: Array, scales: Array, *, dtype: str, region: tuple[int, int], target: tuple[Any, ...]
) -> float:
    """Write the payload and the scales of whole rows of regions; return amax, NaN if the weight holds a NaN or infinity.

    Shapes: weight [N, K] uint16/uint32 bits of `dtype` (BF16, F16, F32); payload [N, K] uint8;
        scales [ceil(N/R), ceil(K/C)] float32, where region = (R, C).
    target: `target_of(format, rounding)`; with `fixed=True` the scales are read, not computed.
    The bytes of a region with a NaN or infinity mean nothing.
    """
    limits = (_SIGN_MASK[dtype], _INFINITY[dtype])
    return float(_quantize_rows(weight, payload, scales, region, _KIND[dtype], limits, target))


def target_of(format: Float8Format, rounding: ScaleRounding, *, fixed: bool = False) -> tuple[Any, ...]:
    """Return what the kernel needs to know of a format: max, emax, the encoder's three constants, the rounding.

    The encoder adds to |q| a power of two 23 - mantissa_bits binades above it, so that the float32 adder rounds to
    the FP8 grid, half to even. The low bits of the sum, plus the exponent moved to its FP8 place, plus a constant,
    are the code; the constant is even and small, so it rides in the low bits of the addend.
    """
    shift = 23 - format.mantissa_bits
    smallest = (128 - format.bias) << 23  # float32 bits of the smallest normal FP8 number
    constant = -((128 - format.bias) << format.mantissa_bits) & 0xFF
    return (
        np.float32(format.max),
        format.emax,
        np.uint32(smallest),
        np.uint32((shift << 23) | constant),
        np.uint32(shift),
        _ROUNDING[rounding],
        fixed,
    )


def amax_rows(weight: Array, *, dtype: str) -> float:
    """Return the largest magnitude of weight [N, K] (raw bits of `dtype`); NaN if it holds a NaN or infinity."""
    return float(_amax_rows(weight, _KIND[dtype], _SIGN_MASK[dtype], _INFINITY[dtype]))


def scale_of(amax: float, target: tuple[Any, ...]) -> np.float32:
    """Return the scale of a region with this amax, rounded as `target` asks."""
    return np.float32(_scale_of(np.float32(amax), target))


def error_rows(weight: Array, payload: Array, scales: Array, *, dtype: str, region: tuple[int, int], table: Array) -> Array:
    """Return float64 [signal, noise]: the energy of the weight and of what quantizing took away.

    table: float32 [256], the value of each FP8 byte. `quantize_rows` gives the other arguments their meaning.
    """
    return np.asarray(_error_rows(weight, payload, scales, region, _KIND[dtype], table))


@intrinsic  # type: ignore[untyped-decorator]
def _bits(context: Any, value: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(types.uint32))

    return types.uint32(types.float32), build


@intrinsic  # type: ignore[untyped-decorator]
def _float(context: Any, value: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(types.float32))

    return types.float32(types.uint32), build


@intrinsic  # type: ignore[untyped-decorator]
def _shift_right(context: Any, value: Any, amount: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.lshr(args[0], args[1])

    return types.uint32(types.uint32, types.uint32), build


_kernel = njit(nogil=True, error_model="numpy", cache=True)
_inline = njit(nogil=True, error_model="numpy")


@_inline
def _widen(bits, kind):  # type: ignore[no-untyped-def]
    if kind == 0:
        return _float(np.uint32(np.uint32(bits) << np.uint32(16)))
    if kind == 1:
        half = np.uint32(bits)
        magnitude = np.uint32(np.uint32(half & np.uint32(0x7FFF)) << np.uint32(13))
        sign = np.uint32(np.uint32(half & np.uint32(0x8000)) << np.uint32(16))
        rescaled = _float(magnitude) * np.float32(2.0**112)  # exact, subnormals included
        return _float(np.uint32(_bits(rescaled) | sign))
    return _float(np.uint32(bits))


@_inline
def _widen_row(row, kind, values):  # type: ignore[no-untyped-def]
    if kind == 0:
        for c in range(row.size):
            values[c] = _widen(row[c], 0)
    elif kind == 1:
        for c in range(row.size):
            values[c] = _widen(row[c], 1)
    else:
        for c in range(row.size):
            values[c] = _widen(row[c], 2)


@_inline
def _scale_of(amax, target):  # type: ignore[no-untyped-def]
    largest, emax, rounding = target[0], target[1], target[5]
    if amax == np.float32(0):
        return np.float32(1)
    scale = max(np.float32(amax / largest), np.float32(MIN_SCALE))
    if rounding == 1:
        bits = _bits(scale)
        scale = _float(np.uint32(np.uint32(bits + np.uint32(0x7FFFFF)) & np.uint32(0x7F800000)))
    elif rounding == 2:
        exponent = np.int32(_bits(amax) >> np.uint32(23)) - np.int32(emax)
        scale = _float(np.uint32(np.uint32(max(exponent, np.int32(1))) << np.uint32(23)))
    return scale


@_inline
def _encode(x, scale, target):  # type: ignore[no-untyped-def]
    bits = _bits(x)
    magnitude = min(_float(np.uint32(bits & np.uint32(0x7FFFFFFF))) / scale, target[0])
    exponent = max(np.uint32(_bits(magnitude) & np.uint32(0x7F800000)), target[2])
    total = _bits(magnitude + _float(np.uint32(exponent + target[3])))
    code = np.uint32(total + _shift_right(exponent, target[4]))
    return np.uint8(np.uint32(code | np.uint32(np.uint32(bits >> np.uint32(24)) & np.uint32(0x80))))


@_inline
def _peaks(weight, lo, hi, mask, peaks):  # type: ignore[no-untyped-def]
    first = weight[lo]
    for k in range(first.size):
        peaks[k] = peaks.dtype.type(first[k] & mask)
    for r in range(lo + 1, hi):
        row = weight[r]
        for k in range(row.size):
            magnitude = peaks.dtype.type(row[k] & mask)
            peaks[k] = magnitude if magnitude > peaks[k] else peaks[k]


@_inline
def _largest(values):  # type: ignore[no-untyped-def]
    found = values[0]
    for k in range(1, values.size):
        found = values[k] if values[k] > found else found
    return found


@_kernel
def _quantize_rows(weight, payload, scales, region, kind, limits, target):  # type: ignore[no-untyped-def]
    n, k = weight.shape
    rows, cols = region
    mask, infinity = limits
    peaks = np.empty(k, weight.dtype)
    row_scales = np.empty(k, np.float32)
    values = np.empty(k, np.float32)
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
            _widen_row(weight[r], kind, values)
            codes = payload[r]
            for c in range(k):
                codes[c] = _encode(values[c], row_scales[c], target)
    return _widen(largest, kind) if largest < infinity else np.float32(np.nan)


@_kernel
def _amax_rows(weight, kind, mask, infinity):  # type: ignore[no-untyped-def]
    peaks = np.empty(weight.shape[1], weight.dtype)
    _peaks(weight, 0, weight.shape[0], mask, peaks)
    peak = _largest(peaks)
    return _widen(peak, kind) if peak < infinity else np.float32(np.nan)


@_kernel
def _error_rows(weight, payload, scales, region, kind, table):  # type: ignore[no-untyped-def]
    rows, cols = region
    energy = np.zeros(2, np.float64)
    for r in range(weight.shape[0]):
        signal = np.float64(0)
        noise = np.float64(0)
        for c in range(weight.shape[1]):
            x = np.float64(_widen(weight[r, c], kind))
            error = x - np.float64(table[payload[r, c]]) * np.float64(scales[r // rows, c // cols])
            signal += x * x
            noise += error * error
        energy[0] += signal
        energy[1] += noise
    return energy
