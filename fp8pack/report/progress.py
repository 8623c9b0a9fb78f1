"""Progress on stderr: a bar on a terminal, a plain line every 30 seconds elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fp8pack.report.text import printable
from fp8pack.units import format_seconds, format_size

_LINE_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Work:
    """A kind of work, its unit, and how an amount of it is written."""

    name: str
    unit: str
    format: Callable[[float], str]


PACKING = Work("packing", "B", format_size)
VERIFYING = Work("verifying", "B", format_size)
MEASURING = Work("measuring", "B", format_size)
EVALUATING = Work("evaluating", " tokens", lambda tokens: f"{tokens:.0f} tokens")
CALIBRATING = Work("calibrating", " tokens", lambda tokens: f"{tokens:.0f} tokens")


@contextmanager
def showing_progress(work: Work, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """Yield a function to be called with (amount done, amount in all)."""
    if quiet:
        yield lambda done, total: None
    elif sys.stderr.isatty():
        with _bar(work) as on_progress:
            yield on_progress
    else:
        yield _plain_lines(work)


def print_above(line: str) -> None:
    """Print a line on stderr, above the bar if there is one."""
    from tqdm import tqdm

    tqdm.write(printable(line), file=sys.stderr)


@contextmanager
def _bar(work: Work) -> Iterator[Callable[[int, int], None]]:
    from tqdm import tqdm  # not needed off a terminal

    with tqdm(total=0, unit=work.unit, unit_scale=True, dynamic_ncols=True, leave=False, desc=work.name) as bar:

        def on_progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield on_progress


def _plain_lines(work: Work) -> Callable[[int, int], None]:
    started = last = time.monotonic()

    def on_progress(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _LINE_SECONDS:
            last = now
            left = (total - done) * (now - started) / done if done else 0.0
            rate = f"{work.format(done / (now - started))}/s"
            print(
                f"{work.name}  {work.format(done)} of {work.format(total)}, {rate}, about {format_seconds(left)} left",
                file=sys.stderr,
            )

    return on_progress
