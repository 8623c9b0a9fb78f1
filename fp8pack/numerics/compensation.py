"""Compensated rounding: each column of a weight takes off what rounding the columns before it added to the output.

An error E = W - Q of a weight [N, K] costs |X E^T|^2 on inputs X [T, K], which is the trace of E H E^T with the second
moments H = X^T X. With H = R R^T, R upper triangular, it is |E R|^2, and column i of E R is R_ii times
E_i + sum over j < i of R_ji / R_ii E_j. Taken column after column, Q_i is the FP8 value nearest to
W_i + sum over j < i of G_ij E_j, with G_ij = R_ji / R_ii.

That is GPTQ (Frantar et al., https://arxiv.org/abs/2210.17323) without its inverse, and Babai's nearest plane (Chen et
al., https://arxiv.org/abs/2507.18553). docs/numerics.md, "Compensated rounding".
"""

import math

import numpy as np
from numpy.typing import NDArray

from fp8pack.numerics import native

DAMPING = 0.01  # of the mean of the diagonal, as GPTQ adds it


def feedback_of(moments: NDArray[np.float64], damping: float = DAMPING) -> NDArray[np.float64]:
    """Return the feedback G [B, S, S], strictly lower triangular, of second moments [B, S, S], whose upper ones count.

    damping: added to the diagonal, as a share of its mean, so that H has a factor if there were few tokens or a channel
        was always zero. A block without tokens has a feedback of zeros, which rounds to nearest.
    """
    feedback = np.zeros_like(moments)
    for block, gains in zip(moments, feedback, strict=True):
        diagonal = np.diagonal(block)
        used = int(np.flatnonzero(diagonal).max(initial=-1)) + 1  # a last block may be narrower
        added = damping * math.fsum(diagonal[:used].tolist()) / max(used, 1)
        matrix = block[:used, :used].copy()
        matrix[np.arange(used), np.arange(used)] += added
        if used and native.factor(matrix):
            root = np.diagonal(matrix).copy()
            gains[:used, :used] = np.tril((np.triu(matrix, 1) / root).T, -1)
    return feedback
