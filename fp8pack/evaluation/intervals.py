"""95 % intervals by a bootstrap over documents: positions of one text are no independent samples."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
_SEED = 0
_TAILS = (2.5, 97.5)

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Interval:
    """A value, and the ends of its 95 % interval over documents."""

    value: float
    low: float
    high: float


class Bootstrap:
    """Resamples documents, the same way for every measure."""

    def __init__(self, lengths: list[int]) -> None:
        """`lengths`: positions of each document, in order."""
        count = len(lengths)
        picks = np.random.default_rng(_SEED).integers(0, count, (RESAMPLES, count))
        self._times = np.stack([np.bincount(row, minlength=count) for row in picks]).astype(np.float64)
        self._lengths = np.array(lengths, np.float64)
        self._document = np.repeat(np.arange(count), lengths)

    def mean(self, values: Floats, then: Callable[[Floats], Floats] = lambda means: means) -> Interval:
        """Return the mean over positions [T], or a monotonic function of it."""
        sums = np.bincount(self._document, values, len(self._lengths))
        means = self._times @ sums / (self._times @ self._lengths)
        low, high = np.percentile(then(means), _TAILS)
        return Interval(float(then(np.asarray(values.mean()))), float(low), float(high))

    def percentile(self, values: Floats, percent: float) -> Interval:
        """Return the smallest value [T] that so many percent of all positions do not exceed."""
        order = np.argsort(values, kind="stable")
        ranked, documents = values[order], self._document[order]
        found = []
        for times in self._times:
            weights = np.cumsum(times[documents])
            found.append(ranked[np.searchsorted(weights, weights[-1] * percent / 100)])
        rank = max(0, int(np.ceil(len(values) * percent / 100)) - 1)
        low, high = np.percentile(found, _TAILS)
        return Interval(float(ranked[rank]), float(low), float(high))
