"""What a calibration says, as plain data: for people to look at, and for `--json`."""

import math
from typing import Any

from fp8pack.planning.calibration import GREW, MIN_EXPERT_TOKENS, Calibration, Site, expert_of

NUM_WIDEST = 10
_FEWEST_PROMPTS = 4  # with fewer, nothing can be said of the last quarter


def calibration_facts(calibration: Calibration, *, every_site: bool = False) -> dict[str, Any]:
    """Return prompts, tokens, convergence, the widest sites, spikes and experts that saw too little; or all sites too.

    The width of a site is amax over its 99.9 percentile: how much of the range a few values take.
    """
    sites = [site_facts(site) for site in calibration.sites]
    inputs = [site for site in sites if any(point.endswith(".input") for point in site["points"])]
    growths = [site.growth for site in calibration.sites] if len(calibration.prompts) >= _FEWEST_PROMPTS else None
    finite = [growth for growth in growths or () if math.isfinite(growth)]
    facts: dict[str, Any] = {
        "fingerprint": calibration.fingerprint,
        "options": dict(calibration.options),
        "num_prompts": len(calibration.prompts),
        "num_tokens": calibration.num_tokens,
        "num_sites": len(sites),
        "growth_last_quarter": max(finite, default=1.0) if growths is not None else None,
        "num_growing": sum(growth > GREW for growth in finite),
        "num_reached_late": len(growths or ()) - len(finite),
        "widest": sorted(inputs, key=_width, reverse=True)[:NUM_WIDEST],
        "spikes": [site["points"][0] for site in sites if site["spike"]],
        "rare_experts": [
            {"point": site.points[0], "tokens": site.tokens}
            for site in calibration.sites
            if expert_of(site.points[0]) and site.tokens < MIN_EXPERT_TOKENS
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
        **({"head_amax": site.head_amax.tolist()} if site.heads > 1 else {}),
    }


def _width(site: dict[str, Any]) -> float:
    """Width for sorting: without bound where 99.9 % are zero and the rest is not."""
    return float(site["width"] or (math.inf if site["amax"] else 0.0))
