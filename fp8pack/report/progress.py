"""Progress on stderr: a bar on a terminal, a plain line every 30 seconds elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fp8pack.units import format_seconds, format_size

_LINE_SECONDS = 30.0


@contextmanager
def showing_progress(quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """Yield a function that is told (bytes gone through, bytes in all)."""
    if quiet:
        yield lambda done, total: None
    elif sys.stderr.isatty():
        with _bar() as on_progress:
            yield on_progress
    else:
        yield _plain_lines()


@contextmanager
def _bar() -> Iterator[Callable[[int, int], None]]:
    from tqdm import tqdm  # not needed off a terminal

    with tqdm(total=0, unit="B", unit_scale=True, dynamic_ncols=True, leave=False, desc="packing") as bar:

        def on_progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield on_progress


def _plain_lines() -> Callable[[int, int], None]:
    started = last = time.monotonic()

    def on_progress(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _LINE_SECONDS:
            last = now
            left = (total - done) * (now - started) / done if done else 0.0
            print(
                f"packing  {format_size(done)} of {format_size(total)}, about {format_seconds(left)} left",
                file=sys.stderr,
            )

    return on_progress
