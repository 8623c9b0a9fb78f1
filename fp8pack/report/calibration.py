"""What `calibrate`, `merge` and `inspect` print of a calibration."""

from rich.table import Table
from rich.text import Text

from fp8pack.planning.calibration_summary import CalibrationSummary, SiteSummary
from fp8pack.report.console import make_console
from fp8pack.report.text import listed, printable
from fp8pack.units import format_seconds, format_size, natural

_MAX_NAMES = 4


def summary_lines(summary: CalibrationSummary) -> list[str]:
    """Return the lines after a calibration: what was seen, how it converged, and the widest sites."""
    seen = f"{summary.num_prompts} prompts, {summary.num_tokens} tokens, {summary.num_sites} sites"
    lines = [f"seen     {seen}", *_convergence(summary)]
    if summary.widest:
        lines.append("widest   input activations by amax over their 99.9th percentile")
        names = [next(point for point in site.points if point.endswith(".input")) for site in summary.widest]
        width = max(map(len, names))
        lines += [
            f"         {name:{width}}  {_numbers(site)}" for name, site in zip(names, summary.widest, strict=True)
        ]
    lines += _advice(summary)
    if summary.already_complete:
        lines.append("result   already complete")
    elif summary.seconds is not None:
        lines.append(f"result   {format_seconds(summary.seconds)}  peak {format_size(summary.peak_memory or 0)}")
    return lines


def print_calibration(summary: CalibrationSummary) -> None:
    """Print a line for each site, and the summary, to stdout."""
    console = make_console([point for site in summary.sites for point in site.points])
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("site", overflow="fold")
    for header in ("tokens", "channels", "amax", "99.9 %", "rms", "width"):
        table.add_column(header, justify="right")
    for site in sorted(summary.sites, key=lambda site: natural(site.points[0])):
        names = "\n".join(printable(point) for point in site.points)
        width = f"{site.width:.1f}" if site.width else ""
        numbers = (f"{site.amax:.4g}", f"{site.percentile_99_9:.4g}", f"{site.rms:.4g}", width)
        table.add_row(Text(names), str(site.tokens), str(site.channels), *numbers)
    console.print(table)
    console.print()
    for line in summary_lines(summary):
        console.print(Text(printable(line)))


def _numbers(site: SiteSummary) -> str:
    width = f"{site.width:.1f}x" if site.width else ""
    return f"amax {site.amax:<9.4g} 99.9 % {site.percentile_99_9:<9.4g} rms {site.rms:<9.4g} {width}"


def _convergence(summary: CalibrationSummary) -> list[str]:
    growth, growing, late = summary.growth_last_quarter, summary.num_growing, summary.num_reached_late
    if growth is None:
        return ["growth   unknown: too few prompts to tell whether ranges still grow"]
    lines = (
        [f"growth   {late} sites were first reached in the last quarter of the prompts: add prompts"] if late else []
    )
    if growing:
        ranges = f"{growing} of {summary.num_sites} ranges still grew, by up to {growth - 1:.0%}"
        return [*lines, f"growth   not settled: {ranges}, over the last quarter of the prompts: add prompts"]
    return lines or ["growth   settled: no range grew by more than 1 % over the last quarter of the prompts"]


def _advice(summary: CalibrationSummary) -> list[str]:
    lines = []
    if summary.spikes:
        lines.append(
            f"outliers {len(summary.spikes)} sites have an amax over 10x the 99.9th percentile: "
            f"{listed(list(summary.spikes), _MAX_NAMES)}; one static scale wastes bits there: --ignore keeps such a "
            "weight in BF16, --scheme FP8_DYNAMIC scales each token"
        )
    if rare := summary.rare_experts:
        how = (
            "those of the all-experts run"
            if summary.has_all_experts
            else "those of the other experts of the layer; see --all-experts"
        )
        names = listed([f"{site.point} ({site.tokens})" for site in rare], _MAX_NAMES)
        lines.append(f"experts  {len(rare)} sites of experts saw too few tokens; their scales are {how}: {names}")
    return lines
