"""A calibration: statistics of the activations at every site of a model.

A site is a tensor of activations; its points are its names. Points of a weight's module and of attention, under the
checkpoint's own names:

    <module>.input    input of a GEMM            <norm>.output   output of a norm
    <attention>.k     K after rotary             <attention>.v   V

Magnitudes are stored as BF16 bit patterns without the sign (0 to 0x7F7F), which order as their values do.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fp8pack.modelfacts.fused import storage_key

NUM_MAGNITUDES = 1 << 15  # of BF16, the sign left out
INFINITY = 0x7F80  # and above it NaN
SPIKE_RATIO = 0.1  # a site whose 99.9th percentile is below this share of its amax has outliers
MIN_EXPERT_TOKENS = 32  # an expert with fewer routed tokens borrows its amax
GREW = 1.01  # an amax that became larger than this factor grew
_LAST_QUARTER = 0.75


def value_of(magnitude: int) -> float:
    """Return the value of a BF16 magnitude."""
    return float(np.uint32(int(magnitude) << 16).view(np.float32))


def values_of(magnitudes: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Return the values of BF16 magnitudes, exactly, in float32."""
    return (magnitudes.astype(np.uint32) << 16).view(np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """The second moments X^T X of a site in blocks of `block` channels; `load` reads them, since they are large.

    load: returns the upper triangle of each block, [B, block * (block + 1) / 2] float64; zeros where the last block is
    narrower.
    """

    block: int
    load: Callable[[], NDArray[np.float64]]


@dataclass(frozen=True, slots=True)
class Site:
    """The statistics of one site: T tokens of K channels.

    bins, counts: the histogram of magnitudes, sparse: uint16 ascending, and int64 above zero.
    channel_amax [K] uint16 magnitudes; channel_squares [K] float64, the sum of squares of each channel.
    prompt_amax [P] uint16 magnitudes, in the order of the calibration's prompts; 0 where a prompt did not reach it.
    heads: of K and V, whose channels are ordered by head. moments: if they were asked for, of inputs of GEMMs.
    """

    points: tuple[str, ...]
    tokens: int
    bins: NDArray[np.uint16]
    counts: NDArray[np.int64]
    channel_amax: NDArray[np.uint16]
    channel_squares: NDArray[np.float64]
    prompt_amax: NDArray[np.uint16]
    heads: int = 1
    moments: Moments | None = None

    @property
    def amax(self) -> float:
        """The largest magnitude."""
        return value_of(int(self.bins[-1])) if self.bins.size else 0.0

    @property
    def mean_square(self) -> float:
        """The mean of the squares, over the histogram."""
        total = int(self.counts.sum())
        squares = values_of(self.bins).astype(np.float64) ** 2
        return float(math.fsum(squares * self.counts) / total) if total else 0.0

    def percentile(self, percent: float) -> float:
        """Return the smallest magnitude that at least `percent` of 100 of all magnitudes do not exceed; exact."""
        if not self.bins.size:
            return 0.0
        cumulative = np.cumsum(self.counts)
        rank = max(1, math.ceil(Fraction(str(percent)) * int(cumulative[-1]) / 100))
        return value_of(int(self.bins[np.searchsorted(cumulative, rank)]))

    def group_amax(self, size: int) -> NDArray[np.float32]:
        """Return the amax of each group of `size` channels, exactly: [ceil(K / size)] float32."""
        return values_of(np.maximum.reduceat(self.channel_amax, np.arange(0, self.channel_amax.size, size)))

    @property
    def head_amax(self) -> NDArray[np.float32]:
        """The amax of each head: [heads] float32."""
        return self.group_amax(self.channel_amax.size // self.heads)

    @property
    def has_spike(self) -> bool:
        """Whether there are outliers: few values so large that a scale for them leaves the others few bits."""
        return self.percentile(99.9) < SPIKE_RATIO * self.amax

    @property
    def growth(self) -> float:
        """The factor by which amax grew over the last quarter of the prompts: 1.0 if it did not."""
        first = self.prompt_amax[: math.ceil(self.prompt_amax.size * _LAST_QUARTER)]
        before = value_of(int(first.max())) if first.size else 0.0
        return self.amax / before if before else 1.0 if not self.amax else math.inf


@dataclass(frozen=True)
class Calibration:
    """Statistics of a model over prompts; `all_experts` is what every expert sees if all tokens reach it.

    fingerprint: of the model, as in the plan; empty if a user's own loop did not name the model.
    prompts: digests, in order. num_tokens: of all of them, without padding.
    options: everything else that the statistics depend on.
    """

    fingerprint: str
    prompts: tuple[str, ...]
    options: Mapping[str, Any]
    sites: tuple[Site, ...]
    all_experts: tuple[Site, ...] = ()
    digest: str = ""  # of the file that it was read from
    num_tokens: int = 0

    @cached_property
    def by_point(self) -> Mapping[str, Site]:
        """The site of each point."""
        return _by_point(self.sites)

    @cached_property
    def all_experts_by_point(self) -> Mapping[str, Site]:
        """The site of each point in the set of all experts."""
        return _by_point(self.all_experts)

    @property
    def growth(self) -> float:
        """The largest growth of any site's amax over the last quarter of the prompts."""
        return max((site.growth for site in self.sites), default=1.0)


def is_gemm_input(point: str) -> bool:
    """Say whether a point is the input of a GEMM."""
    return point.endswith(".input")


def expert_of(point: str) -> tuple[str, str] | None:
    """Return the experts' module and the point within each (`down_proj.input`); None for what is no expert's."""
    head, found, tail = point.partition(".experts.")
    index, dot, leaf = tail.partition(".")
    return (f"{head}.experts", leaf) if found and dot and index.isdecimal() else None


def site_order(site: Site) -> tuple[object, ...]:
    """Return the key that sorts sites by the name of their first point, as the checkpoint sorts its tensors."""
    return storage_key(site.points[0])


def has_converged(sites: Iterable[NDArray[np.uint16]], window: int) -> bool:
    """Say whether no site's amax grew by more than 1 % over the last `window` prompts.

    sites: the prompt_amax [P] of each, all of one length.
    """
    for prompt_amax in sites:
        if prompt_amax.size <= window:
            return False
        before, after = prompt_amax[:-window].max(), prompt_amax.max()
        if value_of(int(after)) > GREW * value_of(int(before)):
            return False
    return True


def histogram_of(dense: NDArray[np.int64]) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
    """Return the bins and counts of a dense histogram [32768]."""
    bins = np.flatnonzero(dense)
    return bins.astype(np.uint16), dense[bins]


def _by_point(sites: Sequence[Site]) -> Mapping[str, Site]:
    return {point: site for site in sites for point in site.points}
