"""The result file: what was measured, on what, against which bound."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

from machine import hardware, versions
from measure import Cost

VERDICTS = {True: "PASS", False: "**NOT MET**", None: "NOT RUN"}


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the result table; `costs` are the runs behind it by what ran, `passed` is None when nothing ran."""

    name: str
    bound: str
    value: str
    spread: str
    passed: bool | None
    costs: Mapping[str, Sequence[Cost]] = field(default_factory=dict)


def markdown(rows: Sequence[Row], commands: Mapping[str, Sequence[str]], folders: Sequence[Path], peer: Path) -> str:
    """Return the result file."""
    facts = {"Date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), **hardware(folders)}
    facts["Versions"] = ", ".join(f"{name} {number}" for name, number in versions(peer / "bin/python").items())
    shown = "\n".join(f"# {name}\n" + "\n".join(lines) + "\n" for name, lines in commands.items())
    parts = [
        "# Benchmark results",
        "Written by `python benchmarks/bench.py`; benchmarks/README.md says what each row means.",
        "\n".join(f"- {name}: {value}" for name, value in facts.items()),
        "## Results",
        _table(
            ("what", "bound", "median", "range", "user + sys, s", "verdict"),
            [(r.name, r.bound, r.value, r.spread, _cpu(r.costs), VERDICTS[r.passed]) for r in rows],
        ),
        "## Runs",
        _table(
            ("of", "what ran", "runs", "wall, s", "range", "user, s", "sys, s", "peak, MiB"),
            [_runs(row.name, what, costs) for row in rows for what, costs in row.costs.items()],
        ),
        "## Commands",
        f"```sh\n{shown}```",
    ]
    return "\n\n".join(parts) + "\n"


def _cpu(costs: Mapping[str, Sequence[Cost]]) -> str:
    return ", ".join(
        f"{what} {median(c.user for c in runs):.3g} + {median(c.system for c in runs):.3g}"
        for what, runs in costs.items()
    )


def _runs(row: str, what: str, runs: Sequence[Cost]) -> tuple[str, ...]:
    walls = [run.wall for run in runs]
    peak = max(run.peak_nbytes for run in runs) / 2**20
    middle = (f"{median(walls):.4g}", f"{min(walls):.4g} to {max(walls):.4g}")
    cpu = (f"{median(run.user for run in runs):.3g}", f"{median(run.system for run in runs):.3g}")
    return (row.partition(" ")[0], what, str(len(runs)), *middle, *cpu, f"{peak:.0f}" if peak else "")


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *cells])
