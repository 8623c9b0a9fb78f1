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

DAMPING = 0.01  # of the mean of the diagonal, as GPTQ adds it
PASSES = 1  # over all columns again: the next two gain a tenth of what the first does


@dataclass(frozen=True, slots=True)
class Feedback:
    """What the errors of some columns of a weight say about others, in B blocks of S channels.

    order [B, S] int64: the channels of each block, largest second moment first. gains [B, S, S] float64, strictly lower
    triangular: G of the first rounding, both axes in that order; gains_again [B, S, S]: H_ij / H_ii, zero diagonals.
    """

    order: NDArray[np.int64]
    gains: NDArray[np.float64]
    gains_again: NDArray[np.float64]


def feedback_of(moments: NDArray[np.float64], damping: float = DAMPING) -> Feedback:
    """Return the feedback of second moments [B, S, S], of which the upper triangles count.

    damping: added to the diagonal, as a share of its mean, so that H has a factor after few tokens. A channel that was
        always zero, and a block without tokens, have a feedback of zeros, which rounds to nearest.
    """
    diagonals = np.diagonal(moments, axis1=1, axis2=2)
    order = np.argsort(-diagonals, axis=1, kind="stable")
    gains, again = np.zeros_like(moments), np.zeros_like(moments)
    for i, block in enumerate(moments):
        used = order[i, : np.count_nonzero(diagonals[i])]  # of a last block, the channels that it lacks come last
        matrix = (np.triu(block) + np.triu(block, 1).T)[np.ix_(used, used)]
        np.fill_diagonal(matrix, np.diagonal(matrix) + damping * math.fsum(diagonals[i].tolist()) / max(used.size, 1))
        root, live = matrix.copy(), slice(used.size)
        if used.size and native.factor(root):
            gains[i, live, live] = np.triu(root / np.diagonal(root), 1).T
            again[i, live, live] = matrix / np.diagonal(matrix)[:, None]
            np.fill_diagonal(again[i], 0)
    return Feedback(order, gains, again)


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
