"""How scales are rounded."""

from enum import StrEnum
from typing import Final


class ScaleRounding(StrEnum):
    """How amax / max becomes a scale.

    none: as it is, in float32.
    up: the smallest power of two that is not below it, so that nothing saturates.
    floor: 2^(floor(log2 amax) - emax), the OCP Microscaling 1.0 rule; up to 1/8 (E4M3) of a binade saturates.
    """

    NONE = "none"
    UP = "up"
    FLOOR = "floor"


SCALE_CHOICES: Final = ("amax", "mse")
WEIGHT_ROUNDINGS: Final = ("nearest", "compensated")
DAMPING: Final = 0.01  # of compensated rounding: added to the diagonal, as a share of its mean, as GPTQ adds it
