"""How two models' next-token distributions differ, position by position. Everything is reduced in float64."""

from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

TOP = 5
_ROWS_NBYTES = 64 << 20  # of logits that are widened to float64 at a time


@dataclass(frozen=True, slots=True)
class Positions:
    """What was measured at each of T positions, [T] float64, in nats; P is the source's distribution, Q the other's.

    base_loss, loss: -log P and -log Q of the token that follows. kl: sum of P (log P - log Q) over the vocabulary.
    top1: 1.0 where the likeliest token is the same. top5: the share of P's five likeliest tokens that are among Q's.
    probability: Q minus P of the token that follows.
    """

    base_loss: NDArray[np.float64]
    loss: NDArray[np.float64]
    kl: NDArray[np.float64]
    top1: NDArray[np.float64]
    top5: NDArray[np.float64]
    probability: NDArray[np.float64]

    @staticmethod
    def joined(parts: "list[Positions]") -> "Positions":
        """Return several one after another."""
        return Positions(
            *(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Positions))
        )


def compare_logits(base: Tensor, other: Tensor, following: Tensor) -> Positions:
    """Return what differs between logits [T, V] of two models; following [T]: the token that follows each position."""
    rows = max(1, _ROWS_NBYTES // (8 * base.shape[1]))
    cuts = [slice(begin, begin + rows) for begin in range(0, base.shape[0], rows)]
    return Positions.joined([_compare(base[cut], other[cut], following[cut]) for cut in cuts])


def _compare(base: Tensor, other: Tensor, following: Tensor) -> Positions:
    p, q = (torch.log_softmax(logits.double(), dim=1) for logits in (base, other))
    kl = (p.exp() * (p - q).nan_to_num(nan=torch.nan, posinf=torch.inf)).sum(1)
    ours, theirs = (logits.topk(min(TOP, logits.shape[1]), dim=1).indices for logits in (base, other))
    top5 = (ours.unsqueeze(2) == theirs.unsqueeze(1)).any(2).double().mean(1)
    next_p, next_q = (logs.gather(1, following[:, None])[:, 0] for logs in (p, q))
    top1 = (ours[:, 0] == theirs[:, 0]).double()
    found = (-next_p, -next_q, kl, top1, top5, next_q.exp() - next_p.exp())
    return Positions(*(values.cpu().numpy() for values in found))
