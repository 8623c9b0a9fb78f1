"""Scales: the multipliers that dequantize, and how they are rounded and stored."""

import math

import numpy as np
from numpy.typing import NDArray

from fp8pack.numerics.formats import Float8Format
from fp8pack.numerics.rounding import ScaleRounding

MIN_SCALE = 2.0**-126  # the smallest normal float32: a smaller scale would be flushed to zero on GPUs


def _octave(steps: int) -> NDArray[np.float32]:
    """2^(i / steps) for i below steps, a power of two, by square roots and products, which IEEE 754 rounds alike."""
    root, found = 2.0, [1.0]
    for _ in range(steps.bit_length() - 1):
        root = math.sqrt(root)
    for _ in range(steps - 1):
        found.append(found[-1] * root)
    return np.array(found, np.float32)


CANDIDATES = _octave(16)  # of a search for scales, times that of amax: 32 gain no more


def scale_of(amax: float, format: Float8Format, rounding: ScaleRounding) -> np.float32:
    """Return the scale of a region with this amax: what the kernels compute for each of theirs."""
    if amax == 0:
        return np.float32(1)
    scale = max(np.float32(amax) / np.float32(format.max), np.float32(MIN_SCALE))
    match rounding:
        case ScaleRounding.NONE:
            return np.float32(scale)
        case ScaleRounding.UP:
            bits = (int(np.float32(scale).view(np.uint32)) + 0x7FFFFF) & 0x7F800000
        case ScaleRounding.FLOOR:
            bits = max((int(np.float32(amax).view(np.uint32)) >> 23) - format.emax, 1) << 23
    return np.uint32(bits).view(np.float32)


def better_scales(scales: NDArray[np.float32], errors: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return of the candidates scale * CANDIDATES the one with the least error, the smallest of equals.

    Shapes: scales [...]; errors [..., C], as `native.add_scale_errors` adds them up.
    """
    better: NDArray[np.float32] = scales * CANDIDATES[np.argmin(errors, -1)]
    return better


def encode_e8m0(scales: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return the E8M0 bytes (value 2^(byte - 127)) of scales that are powers of two, float32, normal."""
    return (scales.view(np.uint32) >> 23).astype(np.uint8)


def decode_e8m0(exponents: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return 2^(byte - 127) in float32; byte 0 is the subnormal 2^-127, byte 255 is NaN."""
    bits = exponents.astype(np.uint32) << 23
    bits[exponents == 0] = 0x00400000
    bits[exponents == 255] = 0x7FC00000
    return bits.view(np.float32)
