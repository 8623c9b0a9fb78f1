"""Statistics while they grow: one recorder for each site."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fp8pack.numerics.native import observe_rows
from fp8pack.planning.calibration import NUM_MAGNITUDES, Site, histogram_of

_SPLIT_ELEMENTS = 1 << 18  # below, a second thread costs more than it saves
_NONE = 1 << 16  # above every magnitude


@dataclass(frozen=True, slots=True)
class Rows:
    """Which prompt each row belongs to: its index, int32, -1 for padding."""

    prompts: NDArray[np.int32]
    num_prompts: int  # those that rows belong to, and all before them
    num_tokens: int  # rows that are no padding

    @classmethod
    def of(cls, prompts: NDArray[np.int32]) -> "Rows":
        """Return the rows of these prompts."""
        return cls(prompts, int(prompts.max(initial=-1)) + 1, int(np.count_nonzero(prompts >= 0)))

    def repeat(self, times: int) -> "Rows":
        """Return the rows of a tensor with several for each of these, as one for each head."""
        return self if times == 1 else Rows(self.prompts.repeat(times), self.num_prompts, self.num_tokens * times)


class Threads:
    """Threads that share the columns of one call among them; the statistics do not depend on their number."""

    def __init__(self, count: int) -> None:
        self._pool = ThreadPoolExecutor(count - 1) if count > 1 else None
        self._count = count
        self._scratch = [np.zeros(NUM_MAGNITUDES, np.int64) for _ in range(count - 1)]

    def observe(
        self,
        values: NDArray[np.uint16],
        prompts: NDArray[np.int32],
        channels: tuple[NDArray[np.uint16], NDArray[np.float64]],
        totals: tuple[NDArray[np.int64], NDArray[np.uint16]],
    ) -> int:
        """Add values [T, K] to channel_amax, channel_squares and histogram, prompt_amax, as `observe_rows` does."""
        k = values.shape[1]
        if self._pool is None or values.size < _SPLIT_ELEMENTS or k < self._count:
            return observe_rows(values, prompts, (*channels, *totals), (0, k))
        bounds = [k * i // self._count for i in range(self._count + 1)]
        jobs = []
        for histogram, begin, end in zip(self._scratch, bounds[1:], bounds[2:], strict=False):
            histogram[:] = 0
            prompt_amax = np.zeros_like(totals[1])
            future = self._pool.submit(observe_rows, values, prompts, (*channels, histogram, prompt_amax), (begin, end))
            jobs.append((future, histogram, prompt_amax))
        least = observe_rows(values, prompts, (*channels, *totals), (0, bounds[1]))
        for future, histogram, prompt_amax in jobs:
            least = min(least, future.result())
            np.add(totals[0], histogram, out=totals[0])
            np.maximum(totals[1], prompt_amax, out=totals[1])
        return least

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()


class Recorder:
    """The growing statistics of one site; `points` are the names it has gone by so far."""

    def __init__(self, points: Sequence[str], channels: int) -> None:
        self.points = list(points)
        self.tokens = 0
        self.num_tensors = 0
        self._histogram = np.zeros(NUM_MAGNITUDES, np.int64)  # pages that no magnitude falls on are never touched
        self._least = _NONE
        self._channels = (np.zeros(channels, np.uint16), np.zeros(channels, np.float64))
        self._prompt_amax = np.zeros(64, np.uint16)

    @classmethod
    def of_site(cls, site: Site) -> "Recorder":
        """Go on where a site stands."""
        recorder = cls(site.points, site.channel_amax.size)
        recorder.tokens = recorder.num_tensors = site.tokens
        recorder._histogram[site.bins] = site.counts
        recorder._least = int(site.bins[site.bins > 0].min(initial=_NONE - 1))
        recorder._channels = (site.channel_amax.copy(), site.channel_squares.copy())
        recorder._reserve(site.prompt_amax.size)
        recorder._prompt_amax[: site.prompt_amax.size] = site.prompt_amax
        return recorder

    def add(self, values: NDArray[np.uint16], rows: Rows, threads: Threads) -> None:
        """Add values [T, K], BF16 bits, of rows that belong to these prompts."""
        if values.shape[1] != self._channels[0].size:
            raise ValueError(f"{self.points[0]} had {self._channels[0].size} channels, now {values.shape[1]}")
        self._reserve(rows.num_prompts)
        least = threads.observe(values, rows.prompts, self._channels, (self._histogram, self._prompt_amax))
        self._least = min(self._least, least)
        self.tokens += rows.num_tokens

    def spread(self, prompts: Sequence[int]) -> None:
        """Let each of these prompts have the largest amax among them: their rows could not be told apart."""
        self._reserve(max(prompts) + 1)
        chosen = np.array(prompts)
        self._prompt_amax[chosen] = self._prompt_amax[chosen].max()

    def join(self, points: Sequence[str]) -> "Recorder":
        """Go by these names, too."""
        self.points.extend(points)
        return self

    def copy_to(self, other: "Recorder | None") -> "Recorder":
        """Return a copy; `other`, if it has as many channels, is made one instead of a new one."""
        if other is None or other._channels[0].size != self._channels[0].size:
            other = Recorder(self.points, self._channels[0].size)
        other._histogram[other._used] = 0
        other._histogram[0] = self._histogram[0]
        other._histogram[self._used] = self._histogram[self._used]
        other.points, other.tokens, other.num_tensors = list(self.points), self.tokens, self.num_tensors
        other._least = self._least
        np.copyto(other._channels[0], self._channels[0])
        np.copyto(other._channels[1], self._channels[1])
        other._prompt_amax = self._prompt_amax.copy()
        return other

    @property
    def _used(self) -> slice:
        """The bins that are not zero, but for that of zero itself."""
        return slice(self._least, int(self._channels[0].max(initial=0)) + 1)

    def prompt_amax(self, num_prompts: int) -> NDArray[np.uint16]:
        """The amax of each prompt [P], as magnitudes; 0 where a prompt did not get here."""
        self._reserve(num_prompts)
        return self._prompt_amax[:num_prompts]

    def site(self, num_prompts: int) -> Site:
        """Return the statistics as they stand after this many prompts."""
        channel_amax, channel_squares = self._channels[0].copy(), self._channels[1].copy()
        amax = self.prompt_amax(num_prompts).copy()
        return Site(
            tuple(self.points), self.tokens, *histogram_of(self._histogram), channel_amax, channel_squares, amax
        )

    def _reserve(self, num_prompts: int) -> None:
        if num_prompts > self._prompt_amax.size:
            grown = np.zeros(max(num_prompts, 2 * self._prompt_amax.size), np.uint16)
            grown[: self._prompt_amax.size] = self._prompt_amax
            self._prompt_amax = grown
