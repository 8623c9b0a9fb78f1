"""Bounds on what a hostile text or pattern can cost, where a parser or an expression has none of its own."""

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

MAX_DEPTH = 100


def depth_of(text: str) -> int:
    """Return how deep the brackets of a YAML or JSON text nest, those in quotes included: parsers may take long."""
    depth = deepest = 0
    for bracket in re.findall(r"[\[\]{}]", text):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    return deepest


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError when this much time is over; only the main thread can be interrupted, others are not."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
