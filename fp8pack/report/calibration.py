"""What `calibrate`, `merge` and `inspect` say of a calibration, drawn from its facts."""

from typing import Any

from rich.table import Table
from rich.text import Text

from fp8pack.report.table import make_console
from fp8pack.report.text import printable
from fp8pack.units import format_seconds, format_size

_MAX_NAMES = 4


def summary_lines(facts: dict[str, Any]) -> list[str]:
    """Return the lines after a calibration: what was seen, how it converged, and the widest sites."""
    lines = [f"seen     {facts['num_prompts']} prompts, {facts['num_tokens']} tokens, {facts['num_sites']} sites"]
    lines += _convergence(facts)
    if facts["widest"]:
        lines.append("widest sites: what enters a GEMM, by amax over the magnitude that 99.9 % stay below")
        names = [next(point for point in site["points"] if point.endswith(".input")) for site in facts["widest"]]
        width = max(map(len, names))
        lines += [
            f"         {name:{width}}  {_numbers(site)}" for name, site in zip(names, facts["widest"], strict=True)
        ]
    lines += _advice(facts)
    if facts.get("already_complete"):
        lines.append("result   already complete")
    elif "seconds" in facts:
        peak = format_size(facts["peak_memory"])
        lines.append(f"result   {format_seconds(facts['seconds'])}  peak {peak}")
    return lines


def print_calibration(facts: dict[str, Any]) -> None:
    """Print a line for each site, and the summary, to stdout."""
    console = make_console([point for site in facts["sites"] for point in site["points"]])
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("site", overflow="fold")
    for header in ("tokens", "channels", "amax", "99.9 %", "rms", "width"):
        table.add_column(header, justify="right")
    for site in facts["sites"]:
        names = "\n".join(printable(point) for point in site["points"])
        width = f"{site['width']:.1f}" if site["width"] else ""
        numbers = (f"{site['amax']:.4g}", f"{site['percentile_99_9']:.4g}", f"{site['rms']:.4g}", width)
        table.add_row(Text(names), str(site["tokens"]), str(site["channels"]), *numbers)
    console.print(table)
    console.print()
    for line in summary_lines(facts):
        console.print(Text(printable(line)))


def _numbers(site: dict[str, Any]) -> str:
    width = f"{site['width']:.1f}x" if site["width"] else ""
    return f"amax {site['amax']:<9.4g} 99.9 % {site['percentile_99_9']:<9.4g} rms {site['rms']:<9.4g} {width}"


def _convergence(facts: dict[str, Any]) -> list[str]:
    growth, growing, late = facts["growth_last_quarter"], facts["num_growing"], facts["num_reached_late"]
    if growth is None:
        return ["growing  too few prompts to tell whether any amax still grows"]
    lines = [f"growing  {late} sites were first reached in the last quarter of the prompts: take more"] if late else []
    if growing:
        most = f"at most by {growth - 1:.0%}"
        return [
            *lines,
            f"growing  {growing} of {facts['num_sites']} amax grew over the last quarter of the prompts, {most}",
        ]
    return lines or ["settled  no amax grew by more than 1 % over the last quarter of the prompts"]


def _advice(facts: dict[str, Any]) -> list[str]:
    lines = []
    if spikes := facts["spikes"]:
        names = ", ".join(spikes[:_MAX_NAMES]) + (
            f" and {len(spikes) - _MAX_NAMES} more" if spikes[_MAX_NAMES:] else ""
        )
        lines.append(
            f"spikes   {len(spikes)} sites have an amax over ten times what 99.9 % stay below: {names}; one static "
            "scale wastes bits there: --ignore keeps such a weight in BF16, --scheme FP8_DYNAMIC scales each token"
        )
    if rare := facts["rare_experts"]:
        how = "taken from the run of all tokens" if facts["has_all_experts"] else "their peers'; see --all-experts"
        names = ", ".join(f"{site['point']} ({site['tokens']})" for site in rare[:_MAX_NAMES])
        more = f" and {len(rare) - _MAX_NAMES} more" if rare[_MAX_NAMES:] else ""
        lines.append(
            f"experts  {len(rare)} sites of experts saw too few tokens, so their scales are {how}: {names}{more}"
        )
    return lines
