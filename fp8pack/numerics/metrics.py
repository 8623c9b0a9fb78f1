"""How much of a weight survives quantization."""

import math


def sqnr_db(signal: float, noise: float) -> float:
    """Return the signal-to-quantization-noise ratio 10 log10(signal / noise) in dB; infinite where nothing is lost.

    E4M3 weights lie near 31.5 dB, E5M2 near 25.7 dB: three and two mantissa bits, 6.02 dB a bit.
    """
    return 10 * math.log10(signal / noise) if noise > 0 and signal > 0 else math.inf
