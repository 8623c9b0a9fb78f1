"""The page of `inspect CALIBRATION --html`."""

import re
from collections.abc import Callable, Iterable

from fp8pack.planning.calibration_summary import CalibrationSummary, SiteSummary
from fp8pack.report.page.document import document
from fp8pack.report.page.inspection import by_layer
from fp8pack.report.page.parts import Column, bars, facts, heat_map, long_table, paragraph, section, table
from fp8pack.report.sentences import verdict_of_calibration
from fp8pack.units import natural

_EXPERT = re.compile(r"\.(\d+)\..*\.experts\.(\d+)\.(\w+)\.input$")


def calibration_page(found: CalibrationSummary, command: str = "") -> str:
    """Return a calibration as a page."""
    inputs = [(site, point) for site in found.sites for point in site.points if point.endswith(".input")]
    sections = [
        *(paragraph(said, "lead") for said in verdict_of_calibration(found)),
        facts([("fingerprint of the model", found.fingerprint), *((k, str(v)) for k, v in found.options.items())]),
        section("Growth with prompts", _growth(found)),
        section(
            "Ranges by layer",
            _by_layer("amax of input activations; darker is larger", inputs, lambda site: site.amax, "{:.3g}"),
            _by_layer(
                "Outliers: amax over the 99.9th percentile; darker is wider", inputs, lambda site: site.width, "{:.1f}"
            ),
        ),
        section("K and V by head", _heads(found)),
        section("Tokens per expert", _experts(found)),
        section("Sites", _sites(found)),
    ]
    return document(f"{found.output.name}: calibration", sections, command)


def _growth(found: CalibrationSummary) -> str:
    steps = [
        (f"{step.prompts} prompt{'s' if step.prompts > 1 else ''}", step.share, f"{step.share:.1%} of the final amax")
        for step in found.growth
    ]
    return bars("amax after so many prompts, over all sites on average", steps)


def _by_layer(
    caption: str,
    inputs: Iterable[tuple[SiteSummary, str]],
    value: Callable[[SiteSummary], float | None],
    how: str,
) -> str:
    """A heat map of layers and modules; of experts, the largest of a layer."""
    found = {point.removesuffix(".input"): number for site, point in inputs if (number := value(site)) is not None}
    return heat_map(caption, *by_layer(found, max), how.format)


def _heads(found: CalibrationSummary) -> str:
    sites = {point: site.head_amax for site in found.sites if site.head_amax for point in site.points}
    widest = max(map(len, sites.values()), default=0)
    rows: dict[str, list[float | None]] = {
        point: [*sites[point], *[None] * (widest - len(sites[point]))] for point in sorted(sites, key=natural)
    }
    return heat_map("amax of each head of K and V", [str(i) for i in range(widest)], rows, "{:.3g}".format)


def _experts(found: CalibrationSummary) -> str:
    """Tokens that each expert saw, by layer."""
    counts: dict[int, dict[int, int]] = {}
    for site in found.sites:
        for match in filter(None, map(_EXPERT.search, site.points)):
            layer = counts.setdefault(int(match[1]), {})
            layer[int(match[2])] = max(layer.get(int(match[2]), 0), site.tokens)
    experts = range(max((max(layer) for layer in counts.values()), default=-1) + 1)
    rows: dict[str, list[float | None]] = {
        f"layer {i}": [float(counts[i].get(expert, 0)) for expert in experts] for i in sorted(counts)
    }
    least = [
        (f"layer {i}", str(min(counts[i].values())), str(max(counts[i].values())), str(len(experts) - len(counts[i])))
        for i in sorted(counts)
    ]
    headers = ("", "fewest tokens", "most tokens", "experts without any")
    return heat_map("Tokens routed to each expert", list(map(str, experts)), rows, "{:.0f}".format) + table(
        "Load by layer", headers, least, numbers=(1, 2, 3)
    )


def _sites(found: CalibrationSummary) -> str:
    sites = sorted(found.sites, key=lambda site: natural(site.points[0]))
    columns = (
        Column("name", "site"),
        Column("tokens", "tokens", number=True, down=True),
        Column("channels", "channels", number=True, down=True),
        Column("amax", "amax", number=True, digits=4, down=True),
        Column("p999", "99.9 %", number=True, digits=4, down=True),
        Column("rms", "rms", number=True, digits=4, down=True),
        Column("width", "width", number=True, digits=3, down=True),
    )
    values = (
        [", ".join(site.points) for site in sites],
        [site.tokens for site in sites],
        [site.channels for site in sites],
        [site.amax for site in sites],
        [site.percentile_99_9 for site in sites],
        [site.rms for site in sites],
        [site.width for site in sites],
    )
    return long_table("sites", columns, values, "down_proj width>10")
