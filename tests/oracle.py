"""An independent answer to what the bytes must be: ml_dtypes casts, NumPy float32 division, no code of fp8pack."""

import json
from typing import Any

import ml_dtypes
import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

ELEMENT = {
    "e4m3": (ml_dtypes.float8_e4m3fn, np.float32(448), 8),
    "e5m2": (ml_dtypes.float8_e5m2, np.float32(57344), 15),
}


def region_of(granularity: str, shape: tuple[int, int]) -> tuple[int, int]:
    """The rows and columns that share a scale."""
    kind, _, size = granularity.partition(":")
    match kind:
        case "tensor":
            return shape
        case "channel":
            return 1, shape[1]
        case "group":
            return 1, int(size)
        case "mx":
            return 1, 32
        case _:
            rows, cols = size.split("x")
            return int(rows), int(cols)


def spread(scales: NDArray[np.float32], region: tuple[int, int], shape: tuple[int, int]) -> NDArray[np.float32]:
    """One scale for each element."""
    return np.repeat(np.repeat(scales, region[0], 0), region[1], 1)[: shape[0], : shape[1]]


def quantize(
    weight: NDArray[np.float32], format: str, granularity: str, rounding: str = "none", amax: float | None = None
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """The payload and the scales of a float32 weight; `amax` replaces that of a whole tensor."""
    element, largest, emax = ELEMENT[format]
    shape = (weight.shape[0], weight.shape[1])
    region = region_of(granularity, shape)
    rows, cols = -(-shape[0] // region[0]), -(-shape[1] // region[1])
    scales = np.empty((rows, cols), np.float32)
    for i in range(rows):
        for j in range(cols):
            part = weight[i * region[0] : (i + 1) * region[0], j * region[1] : (j + 1) * region[1]]
            scales[i, j] = scale(np.float32(np.abs(part).max() if amax is None else amax), largest, emax, rounding)
    quotient = np.clip(weight / spread(scales, region, shape), -largest, largest)
    return quotient.astype(element).view(np.uint8), scales


def scale(amax: np.float32, largest: np.float32, emax: int, rounding: str) -> np.float32:
    """The scale of one region."""
    if amax == 0:
        return np.float32(1)
    exact = max(amax / largest, np.float32(2.0**-126))
    if rounding == "up":
        mantissa, exponent = np.frexp(exact)
        return np.float32(np.ldexp(1.0, int(exponent) - (1 if mantissa == 0.5 else 0)))
    if rounding == "floor":
        return np.float32(2.0 ** max(int(np.frexp(amax)[1]) - 1 - emax, -126))
    return np.float32(exact)


def root_of(document: dict[str, Any]) -> str:
    """The root that a parsed manifest must carry: BLAKE3 of the canonical JSON of all the rest."""
    body = {key: value for key, value in document.items() if key != "root"}
    text = json.dumps(body, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return f"blake3:{blake3(text.encode()).hexdigest()}"
