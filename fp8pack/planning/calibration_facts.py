"""What a calibration says, as plain data: for people to look at, and for `--json`."""

import math
from typing import Any

from fp8pack.planning.calibration import Calibration, Site

NUM_WIDEST = 10
MIN_EXPERT_TOKENS = 32  # an expert with fewer routed tokens borrows its amax
_GREW = 1.01


def calibration_facts(calibration: Calibration, *, every_site: bool = False) -> dict[str, Any]:
    """Return prompts, tokens, convergence, the widest sites, spikes and experts that saw too little; or all sites too.

    The width of a site is amax over its 99.9 percentile: how much of the range a few values take.
    """
    sites = [site_facts(site) for site in calibration.sites]
    inputs = [site for site in sites if any(point.endswith(".input") for point in site["points"])]
    growth = calibration.growth
    facts: dict[str, Any] = {
        "fingerprint": calibration.fingerprint,
        "options": dict(calibration.options),
        "num_prompts": len(calibration.prompts),
        "num_tokens": max((site["tokens"] for site in inputs), default=0),
        "num_sites": len(sites),
        "growth_last_quarter": growth if math.isfinite(growth) else None,
        "num_growing": sum(site.growth > _GREW for site in calibration.sites),
        "widest": sorted(inputs, key=_width, reverse=True)[:NUM_WIDEST],
        "spikes": [site["points"][0] for site in sites if site["spike"]],
        "rare_experts": [
            {"point": site.points[0], "tokens": site.tokens}
            for site in calibration.sites
            if is_expert(site) and site.tokens < MIN_EXPERT_TOKENS
        ],
        "has_all_experts": bool(calibration.all_experts),
    }
    return facts | ({"sites": sites} if every_site else {})


def site_facts(site: Site) -> dict[str, Any]:
    """Return a site's names, tokens, amax, 99.9 percentile, root mean square, width, and whether it has a spike."""
    usual = site.percentile(99.9)
    return {
        "points": list(site.points),
        "tokens": site.tokens,
        "channels": int(site.channel_amax.size),
        "amax": site.amax,
        "percentile_99_9": usual,
        "rms": math.sqrt(site.mean_square),
        "width": site.amax / usual if usual else None,
        "spike": site.has_spike,
    }


def _width(site: dict[str, Any]) -> float:
    """Width for sorting: without bound where 99.9 % are zero and the rest is not."""
    return float(site["width"] or (math.inf if site["amax"] else 0.0))


def is_expert(site: Site) -> bool:
    """Say whether a site is what enters one expert of many."""
    return expert_of(site.points[0]) is not None


def expert_of(point: str) -> tuple[str, str] | None:
    """Return the experts' module and what the point is of each (`down_proj.input`); None for what is no expert's."""
    head, found, tail = point.partition(".experts.")
    index, dot, leaf = tail.partition(".")
    return (f"{head}.experts", leaf) if found and dot and index.isdigit() else None
