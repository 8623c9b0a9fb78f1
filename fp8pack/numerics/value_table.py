"""What each byte of a format stands for."""

import numpy as np
from numpy.typing import NDArray

from fp8pack.numerics.formats import E5M2, Float8Format, Format


def value_table(format: Format) -> NDArray[np.float32]:
    """Return the value of each code, float32: of 256 bytes, or 16 nibbles; E4M3 has NaN at 0x7F/0xFF, E5M2 also inf."""
    if not isinstance(format, Float8Format):
        return np.array(format.values, np.float32)
    codes = np.arange(128)
    exponent, mantissa = codes >> format.mantissa_bits, codes & ((1 << format.mantissa_bits) - 1)
    fraction = mantissa / (1 << format.mantissa_bits)
    positive = np.where(
        exponent == 0, fraction * 2.0 ** (1 - format.bias), (1 + fraction) * 2.0 ** (exponent - format.bias)
    )
    if format.bias == E5M2.bias:
        positive[-4:] = [np.inf, np.nan, np.nan, np.nan]
    else:
        positive[-1] = np.nan
    return np.concatenate([positive, -positive]).astype(np.float32)
