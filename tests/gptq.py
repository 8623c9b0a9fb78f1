"""Compensated rounding in NumPy: GPTQ, which inverts, and shares no code with what it proves."""

from typing import Any

import numpy as np
import oracle
from numpy.typing import NDArray

from fp8pack.numerics.compensation import PASSES
from fp8pack.numerics.rounding import DAMPING

Array = NDArray[Any]


def gptq(weight: Array, hessian: Array, spread: Array, format: str, size: int) -> Array:
    """Return the codes [N, K] of GPTQ in blocks of `size` channels, for scales that are spread to [N, K].

    hessian [K, K]: X^T X. Channels are rounded in order of their energy, then each again given all others.
    """
    codes, (element, largest, _) = np.empty(weight.shape, np.uint8), oracle.ELEMENT[format]

    def round_to(values: Array, column: int) -> Array:
        scale = spread[:, column]
        rounded = np.clip(values.astype(np.float32) / scale, -largest, largest).astype(element)
        codes[:, column] = rounded.view(np.uint8)
        return rounded.astype(np.float32) * scale

    for first in range(0, weight.shape[1], size):
        last = min(first + size, weight.shape[1])
        order = np.argsort(-np.diagonal(hessian)[first:last], kind="stable")
        exact = weight[:, first:last][:, order].astype(np.float64)
        h = hessian[first:last, first:last][np.ix_(order, order)]
        h = h + DAMPING * np.diagonal(h).mean() * np.eye(last - first)
        upper = np.linalg.cholesky(np.linalg.inv(h)).T
        left, rounded = exact.copy(), np.empty_like(exact)
        for i, channel in enumerate(order):
            rounded[:, i] = round_to(left[:, i], first + channel)
            left[:, i:] -= np.outer((left[:, i] - rounded[:, i]) / upper[i, i], upper[i, i:])
        for i, channel in [*enumerate(order)] * PASSES:
            error = exact - rounded
            error[:, i] = 0
            rounded[:, i] = round_to(exact[:, i] + error @ h[:, i] / h[i, i], first + channel)
    return codes


def spread_scales(scales: Array, region: tuple[int, int], shape: tuple[int, int]) -> Array:
    """Return the scale of each element [N, K]."""
    return scales.repeat(region[0], 0).repeat(region[1], 1)[: shape[0], : shape[1]]
