"""Recorders, which accumulate the statistics of a site."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fp8pack.numerics.native import add_moments, address_of, load_observer
from fp8pack.numerics.second_moments import matrices_of, triangles_of
from fp8pack.numerics.tiles import TILE_ROWS
from fp8pack.planning.calibration import NUM_MAGNITUDES, Moments, Site, histogram_of, is_gemm_input
from fp8pack.units import ceil_div

_SPLIT_ELEMENTS = 1 << 18  # below, a second thread costs more time than it saves
_SPLIT_PRODUCTS = 1 << 22  # likewise, of moments
_I32 = np.dtype(np.int32)
_NONE = 1 << 16  # above every magnitude


@dataclass(frozen=True, slots=True)
class Rows:
    """The prompt of each row: its index, int32, -1 for padding."""

    prompts: NDArray[np.int32]
    address: int
    num_prompts: int  # the largest index + 1
    num_tokens: int  # rows that are not padding
    is_uniform: bool  # all rows are of one prompt, none is padding

    @classmethod
    def of(cls, prompts: NDArray[np.int32]) -> "Rows":
        """Return the rows of these prompts."""
        address = address_of(prompts, _I32, prompts.size)
        last = int(prompts.max(initial=-1))
        is_uniform = bool(prompts.size and last == int(prompts.min()))
        return cls(prompts, address, last + 1, int(np.count_nonzero(prompts >= 0)), is_uniform)

    def repeat(self, times: int) -> "Rows":
        """Return the rows of a tensor that has several rows per row of these, such as one per head."""
        return self if times == 1 else Rows.of(self.prompts.repeat(times))

    def take(self, indices: NDArray[np.int64]) -> "Rows":
        """Return the rows at these indices."""
        if self.is_uniform and indices.size <= self.prompts.size:
            return replace(self, num_tokens=indices.size)
        return Rows.of(self.prompts[indices])


class Threads:
    """Threads that split the columns of a call, or the rows of moments; statistics do not depend on their number."""

    def __init__(self, count: int, most: int = 1) -> None:
        """`most`: for moments, which take long enough to wait for threads that still spin."""
        self._pool = ThreadPoolExecutor(max(count, most) - 1) if max(count, most) > 1 else None
        self._count, self._most = count, max(count, most)
        self._scratch = [np.zeros(NUM_MAGNITUDES, np.int64) for _ in range(count - 1)]
        self._observe = load_observer()

    def observe(self, values: int, rows: Rows, shape: tuple[int, int], recorder: "Recorder") -> tuple[int, int]:
        """Add values [T, K] at an address to a recorder; return the smallest magnitude above zero and the largest."""
        (n, k), places = shape, recorder.addresses
        if self._pool is None or self._count == 1 or n * k < _SPLIT_ELEMENTS or k < self._count:
            found = self._observe(values, rows.address, *places, n, k, recorder.capacity, 0, k)
            return found >> 32, found & 0xFFFFFFFF
        bounds = [k * i // self._count for i in range(self._count + 1)]
        jobs = []
        try:
            for histogram, begin, end in zip(self._scratch, bounds[1:], bounds[2:], strict=False):
                histogram[:] = 0
                amax = np.zeros(recorder.capacity, np.uint16)
                own = (_place(histogram), _place(amax))
                columns = (values, rows.address, *places[:2], *own, n, k, amax.size, begin, end)
                jobs.append((self._pool.submit(self._observe, *columns), histogram, amax))
            ranges = [self._observe(values, rows.address, *places, n, k, recorder.capacity, 0, bounds[1])]
        finally:
            wait([future for future, _, _ in jobs])  # also after Ctrl-C: they use the addresses of these arrays
        for future, histogram, amax in jobs:
            ranges.append(future.result())
            recorder.add_counts(histogram, amax)
        return min(found >> 32 for found in ranges), max(found & 0xFFFFFFFF for found in ranges)

    def add_moments(self, values: NDArray[np.uint16], rows: Rows, moments: NDArray[np.float64]) -> None:
        """Add values [T, K] to moments [B, S, S]."""
        count, size, _ = moments.shape
        if self._pool is None or values.size * size < _SPLIT_PRODUCTS:
            add_moments(values, rows.prompts[: len(values)], moments)
            return
        bounds = _cut(count, size, self._most)
        jobs = [
            self._pool.submit(add_moments, values, rows.prompts[: len(values)], moments, part)
            for part in pairwise(bounds[1:])
        ]
        try:
            add_moments(values, rows.prompts[: len(values)], moments, (bounds[0], bounds[1]))
        finally:
            wait(jobs)
        for job in jobs:
            job.result()

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()


class Recorder:
    """The statistics of one site so far; `points` are its names."""

    def __init__(self, points: Sequence[str], channels: int) -> None:
        self.points = list(points)
        self.tokens = 0
        self.num_tensors = 0
        self.heads = 1
        self._histogram = np.zeros(NUM_MAGNITUDES, np.int64)  # pages without a magnitude are never touched
        self._least, self._most = _NONE, 0
        self._channels = (np.zeros(channels, np.uint16), np.zeros(channels, np.float64))
        self._prompt_amax = np.zeros(64, np.uint16)
        self._moments: NDArray[np.float64] | None = None
        self.addresses = self._find_addresses()

    @classmethod
    def of_site(cls, site: Site) -> "Recorder":
        """Return a recorder that continues a site."""
        recorder = cls(site.points, site.channel_amax.size)
        recorder.tokens = recorder.num_tensors = site.tokens
        recorder.heads = site.heads
        recorder._histogram[site.bins] = site.counts
        recorder._least = int(site.bins[site.bins > 0].min(initial=_NONE - 1))
        recorder._most = int(site.bins.max(initial=0))
        recorder._channels[0][:] = site.channel_amax
        recorder._channels[1][:] = site.channel_squares
        recorder._reserve(site.prompt_amax.size)
        recorder._prompt_amax[: site.prompt_amax.size] = site.prompt_amax
        if site.moments is not None:
            recorder._moments = matrices_of(site.moments.load(), site.moments.block)
        return recorder

    @property
    def capacity(self) -> int:
        """Number of prompts with allocated space."""
        return self._prompt_amax.size

    def add(self, values: int, shape: tuple[int, int], rows: Rows, threads: Threads) -> None:
        """Add values [T, K], contiguous BF16 bits at an address, of these rows."""
        if shape[1] != self._channels[0].size:
            raise ValueError(f"{self.points[0]} had {self._channels[0].size} channels, now {shape[1]}")
        if shape[0] > rows.prompts.size:
            raise ValueError(f"{self.points[0]} has {shape[0]} rows, and prompts are known for {rows.prompts.size}")
        self._reserve(rows.num_prompts)
        least, most = threads.observe(values, rows, shape, self)
        self._least, self._most = min(self._least, least), max(self._most, most)
        self.tokens += rows.num_tokens

    def add_moments(self, values: NDArray[np.uint16], block: int, rows: Rows, threads: Threads) -> None:
        """Add values [T, K], raw BF16 bits, to second moments in blocks of so many channels."""
        if self._moments is None:
            self._moments = np.zeros((ceil_div(values.shape[1], block), block, block))
        threads.add_moments(values, rows, self._moments)

    def add_counts(self, histogram: NDArray[np.int64], prompt_amax: NDArray[np.uint16]) -> None:
        """Add the counts of another thread."""
        np.add(self._histogram, histogram, out=self._histogram)
        np.maximum(self._prompt_amax, prompt_amax, out=self._prompt_amax)

    def spread(self, prompts: Sequence[int]) -> None:
        """Set the amax of these prompts to the largest among them, since it is unknown which rows are whose."""
        self._reserve(max(prompts) + 1)
        chosen = np.array(prompts)
        self._prompt_amax[chosen] = self._prompt_amax[chosen].max()

    def copy_to(self, other: "Recorder | None") -> "Recorder":
        """Return a copy; `other` is reused for it if it has as many channels."""
        if other is None or other._channels[0].size != self._channels[0].size:
            other = Recorder(self.points, self._channels[0].size)
        other._histogram[other._used] = 0
        other._histogram[0] = self._histogram[0]
        other._histogram[self._used] = self._histogram[self._used]
        other.points, other.tokens, other.num_tensors = list(self.points), self.tokens, self.num_tensors
        other.heads = self.heads
        other._least, other._most = self._least, self._most
        np.copyto(other._channels[0], self._channels[0])
        np.copyto(other._channels[1], self._channels[1])
        other._reserve(self._prompt_amax.size)
        np.copyto(other._prompt_amax, self._prompt_amax)
        if self._moments is None or other._moments is None:
            other._moments = None if self._moments is None else self._moments.copy()
        else:
            np.copyto(other._moments, self._moments)
        return other

    @property
    def _used(self) -> slice:
        """The range of bins with counts, except the bin of zero."""
        return slice(self._least, self._most + 1)

    def prompt_amax(self, num_prompts: int) -> NDArray[np.uint16]:
        """Return the amax of each prompt [P], as magnitudes; 0 for a prompt without values here."""
        self._reserve(num_prompts)
        return self._prompt_amax[:num_prompts]

    def site(self, num_prompts: int) -> Site:
        """Return the statistics after this many prompts."""
        channel_amax, channel_squares = self._channels[0].copy(), self._channels[1].copy()
        amax = self.prompt_amax(num_prompts).copy()
        histogram = histogram_of(self._histogram)
        is_input = any(map(is_gemm_input, self.points))
        moments = self._stored_moments() if is_input else None
        return Site(
            tuple(self.points), self.tokens, *histogram, channel_amax, channel_squares, amax, self.heads, moments
        )

    def _stored_moments(self) -> Moments | None:
        moments = self._moments
        return None if moments is None else Moments(moments.shape[1], lambda: triangles_of(moments))

    def _reserve(self, num_prompts: int) -> None:
        if num_prompts > self._prompt_amax.size:
            grown = np.zeros(max(num_prompts, 2 * self._prompt_amax.size), np.uint16)
            grown[: self._prompt_amax.size] = self._prompt_amax
            self._prompt_amax = grown
            self.addresses = self._find_addresses()

    def _find_addresses(self) -> tuple[int, int, int, int]:
        """The addresses of the arrays, cached: getting them from NumPy takes as long as a small tensor."""
        amax, squares = self._channels
        return _place(amax), _place(squares), _place(self._histogram), _place(self._prompt_amax)


def _cut(count: int, size: int, parts: int) -> list[int]:
    """Bounds of parts of the rows of moments [B * S]: whole blocks, or rows of one triangle with as many elements."""
    if count >= parts:
        return [count * i // parts * size for i in range(parts + 1)]
    inside = [round(size * (1 - (1 - i / parts) ** 0.5)) // TILE_ROWS * TILE_ROWS for i in range(parts)]
    return [*inside, size] if count == 1 else [0, count * size]


def _place(array: NDArray[Any]) -> int:
    return address_of(array, array.dtype, array.size, written=True)
