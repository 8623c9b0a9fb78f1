"""The summary of a calibration: prompts, convergence, outliers, experts with too few tokens."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from fp8pack.documents import Document, html_table
from fp8pack.planning.calibration import GREW, MIN_EXPERT_TOKENS, Calibration, Site, expert_of, values_of

NUM_WIDEST = 10
_FEWEST_PROMPTS = 4  # with fewer, there is no last quarter


@dataclass(frozen=True, slots=True)
class SiteSummary:
    """The activations at one site: its names, tokens, channels, and magnitudes.

    percentile_99_9: what 99.9 % of the magnitudes stay below. width: amax over that, None where it is zero.
    spike: whether amax is over ten times that. head_amax: [heads], of K and V.
    """

    points: tuple[str, ...]
    tokens: int
    channels: int
    amax: float
    percentile_99_9: float
    rms: float
    width: float | None
    spike: bool
    head_amax: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class RareExpert:
    """A site of an expert that too few tokens were routed to."""

    point: str
    tokens: int


@dataclass(frozen=True, slots=True)
class GrowthStep:
    """How much of its final amax a site had after so many prompts, on average over the sites."""

    prompts: int
    share: float


@dataclass(frozen=True, slots=True, repr=False)
class CalibrationSummary(Document):
    """The content of a calibration file.

    growth_last_quarter: the largest growth of an amax over the last quarter of the prompts, None with fewer than 4.
    num_growing: amax that grew by more than 1 % there. num_reached_late: sites first reached there. widest: inputs by
    width. spikes: sites with one. sites, growth (after 1, 2, 4, … prompts): if asked for, else empty. num_merged: files
    that `merge` joined, 0 if it did not. Of a run of `calibrate`, else None: model, architecture, streamed (one layer
    in memory at a time), already_complete, seconds, peak_memory in bytes.
    """

    output: Path
    fingerprint: str
    options: Mapping[str, object]
    num_prompts: int
    num_tokens: int
    num_sites: int
    growth_last_quarter: float | None
    num_growing: int
    num_reached_late: int
    widest: tuple[SiteSummary, ...]
    spikes: tuple[str, ...]
    rare_experts: tuple[RareExpert, ...]
    has_all_experts: bool
    sites: tuple[SiteSummary, ...] = ()
    growth: tuple[GrowthStep, ...] = ()
    num_merged: int = 0
    model: str | None = None
    architecture: str | None = None
    streamed: bool | None = None
    already_complete: bool | None = None
    seconds: float | None = None
    peak_memory: int | None = None
    notes: tuple[str, ...] = ()

    def _repr_html_(self) -> str:
        title = f"{self.output}: {self.num_prompts} prompts, {self.num_tokens} tokens, {self.num_sites} sites"
        rows = [
            (", ".join(site.points), f"{site.amax:.4g}", f"{site.percentile_99_9:.4g}", f"{site.width or 0:.1f}")
            for site in self.sites or self.widest
        ]
        return html_table(title, ("site", "amax", "99.9 %", "width"), rows)


def summarize(calibration: Calibration, *, output: Path, every_site: bool = False) -> CalibrationSummary:
    """Return what a calibration says, of the file that it is stored in."""
    sites = tuple(map(summarize_site, calibration.sites))
    inputs = [site for site in sites if any(point.endswith(".input") for point in site.points)]
    growths = [site.growth for site in calibration.sites] if len(calibration.prompts) >= _FEWEST_PROMPTS else None
    finite = [growth for growth in growths or () if math.isfinite(growth)]
    return CalibrationSummary(
        output=output,
        fingerprint=calibration.fingerprint,
        options=dict(calibration.options),
        num_prompts=len(calibration.prompts),
        num_tokens=calibration.num_tokens,
        num_sites=len(sites),
        growth_last_quarter=max(finite, default=1.0) if growths is not None else None,
        num_growing=sum(growth > GREW for growth in finite),
        num_reached_late=len(growths or ()) - len(finite),
        widest=tuple(sorted(inputs, key=_width, reverse=True)[:NUM_WIDEST]),
        spikes=tuple(site.points[0] for site in sites if site.spike),
        rare_experts=tuple(
            RareExpert(site.points[0], site.tokens)
            for site in calibration.sites
            if expert_of(site.points[0]) and site.tokens < MIN_EXPERT_TOKENS
        ),
        has_all_experts=bool(calibration.all_experts),
        sites=sites if every_site else (),
        growth=_growth(calibration) if every_site else (),
    )


def _growth(calibration: Calibration) -> tuple[GrowthStep, ...]:
    sites = [values_of(site.prompt_amax) for site in calibration.sites if site.amax and site.prompt_amax.size]
    count = len(calibration.prompts)
    steps = [*(2**i for i in range(count.bit_length()) if 2**i < count), count]
    shares = [[float(amax[:step].max() / amax.max()) for amax in sites if amax.max() > 0] for step in steps]
    return tuple(
        GrowthStep(step, math.fsum(found) / len(found)) for step, found in zip(steps, shares, strict=True) if found
    )


def summarize_site(site: Site) -> SiteSummary:
    """Return the summary of a site."""
    usual = site.percentile(99.9)
    summary = SiteSummary(
        points=site.points,
        tokens=site.tokens,
        channels=int(site.channel_amax.size),
        amax=site.amax,
        percentile_99_9=usual,
        rms=math.sqrt(site.mean_square),
        width=site.amax / usual if usual else None,
        spike=site.has_spike,
    )
    return replace(summary, head_amax=tuple(map(float, site.head_amax))) if site.heads > 1 else summary


def _width(site: SiteSummary) -> float:
    """Width for sorting: infinite where 99.9 % are zero and the rest is not."""
    return site.width or (math.inf if site.amax else 0.0)
