"""Compensated rounding: each column of a weight takes off what rounding the others added to the output.

An error E = W - Q of a weight [N, K] costs |X E^T|^2 on inputs X [T, K], which is the trace of E H E^T with the second
moments H = X^T X. With H = R R^T, R upper triangular, it is |E R|^2, and column i of E R is R_ii times
E_i + sum over j < i of R_ji / R_ii E_j. Taken column after column, Q_i is the FP8 value nearest to
W_i + sum over j < i of G_ij E_j, with G_ij = R_ji / R_ii. That is GPTQ (Frantar et al.,
https://arxiv.org/abs/2210.17323) without its inverse, and Babai's nearest plane (Chen et al.,
https://arxiv.org/abs/2507.18553). Afterwards each column is rounded again, given all others: the best E_i for the trace
is -sum over j != i of H_ij / H_ii E_j. docs/numerics.md, "Compensated rounding".
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fp8pack.numerics import native
from fp8pack.numerics.formats import Float8Format
from fp8pack.numerics.rounding import DAMPING

_STEP = 256  # rows that are transposed at a time
PASSES = 2  # over all columns again: the second gains 3 % of the KL divergence, the next four together 1 %


@dataclass(frozen=True, slots=True)
class Feedback:
    """What the errors of some columns of a weight say about others, in B blocks of S channels.

    order [B, S] int64: the channels of each block, largest second moment first. gains [B, S, S] float64, strictly lower
    triangular: G of the first rounding, both axes in that order; gains_again [B, S, S]: H_ij / H_ii, zero diagonals.
    diagonal, damped [B, S]: H_ii before and after damping.
    """

    order: NDArray[np.int64]
    gains: NDArray[np.float64]
    gains_again: NDArray[np.float64]
    diagonal: NDArray[np.float64]
    damped: NDArray[np.float64]


def feedback_of(moments: NDArray[np.float64], damping: float = DAMPING) -> Feedback:
    """Return the feedback of second moments [B, S, S], of which the upper triangles count; they are overwritten.

    damping: added to the diagonal, as a share of its mean, so that H has a factor after few tokens. A channel that was
        always zero, and a block without tokens, have a feedback of zeros, which rounds to nearest.
    Three times the memory of the moments is used at most.
    """
    diagonals = np.diagonal(moments, axis1=1, axis2=2).copy()
    order = np.argsort(-diagonals, axis=1, kind="stable")
    diagonals = np.take_along_axis(diagonals, order, 1)
    gains, damped = np.zeros_like(moments), diagonals.copy()
    for i, block in enumerate(moments):
        used = order[i, : np.count_nonzero(diagonals[i])]  # of a last block, the channels that it lacks come last
        live = block[: used.size, : used.size]
        _mirror(block)
        block[: used.size] = block[used]
        live[:] = block[: used.size, used]
        block[used.size :], block[:, used.size :] = 0, 0
        damped[i, : used.size] += damping * math.fsum(diagonals[i].tolist()) / max(used.size, 1)
        np.fill_diagonal(live, damped[i])
        root = live.copy()
        if not used.size or not native.factor(root):
            block[:] = 0
            continue
        root /= np.diagonal(root).copy()
        for begin in range(0, used.size, _STEP):
            rows = slice(begin, min(begin + _STEP, used.size))
            gains[i, rows, : rows.stop] = root[: rows.stop, rows].T
            gains[i, rows, rows] = np.tril(gains[i, rows, rows], -1)
        live /= damped[i, : used.size, None]
        np.fill_diagonal(live, 0)
    return Feedback(order, gains, moments, diagonals, damped)


def _mirror(block: NDArray[np.float64]) -> None:
    """Fill the lower triangle of a symmetric matrix from the upper one."""
    for begin in range(0, block.shape[0], _STEP):
        end = begin + _STEP
        square = block[begin:end, begin:end]
        square[:] = np.triu(square) + np.triu(square, 1).T
        block[end:, begin:end] = block[begin:end, end:].T


def compensate(  # noqa: PLR0913
    weight: NDArray[np.uint16] | NDArray[np.uint32],
    payload: NDArray[np.uint8],
    scales: NDArray[np.float32],
    feedback: Feedback,
    *,
    dtype: str,
    region: tuple[int, int],
    format: Float8Format,
) -> None:
    """Write the payload [N, K] of rows of a weight [N, K], raw bits of `dtype`, for scales that are given.

    Rows are independent of each other. Shapes as in `native.quantize_rows`.
    """
    gains = [feedback.gains, *[feedback.gains_again] * PASSES]
    for i, matrix in enumerate(gains):
        native.compensate_rows(
            weight, payload, scales, matrix, feedback.order, dtype=dtype, region=region, format=format, again=i > 0
        )


def output_energy(values: NDArray[np.float32], feedback: Feedback) -> float:
    """Return the energy that rows [N, K] give on the inputs of the second moments, within their blocks, in float64.

    Of a weight it is the signal of its output, of an error the noise.
    """
    (count, size), total = feedback.order.shape, 0.0
    for i in range(count):
        part = values[:, i * size : (i + 1) * size].astype(np.float64)
        columns = part[:, feedback.order[i, : part.shape[1]]]
        live = slice(part.shape[1])
        others = columns @ (feedback.gains_again[i, live, live] * feedback.damped[i, live, None])
        total += float((columns * (columns * feedback.diagonal[i, live] + others)).sum())
    return total
