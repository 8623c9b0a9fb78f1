"""Progress of an evaluation: tokens done, and the deadline."""

import time
from collections.abc import Callable

from fp8pack.errors import DeadlineError

OnProgress = Callable[[int, int], None]  # tokens done, tokens in all


class Progress:
    """Counts tokens; those of a streamed model once per layer, and once for the logits."""

    def __init__(self, total: int, deadline: float | None, on_progress: OnProgress) -> None:
        """`deadline`: in seconds of time.monotonic()."""
        self._done, self._total = 0, total
        self._deadline, self._on_progress = deadline, on_progress

    def tick(self, tokens: int) -> None:
        """Count tokens; DeadlineError if the deadline is reached."""
        self._done += tokens
        self._on_progress(self._done, self._total)
        if self._deadline is not None and time.monotonic() > self._deadline:
            raise DeadlineError(
                f"the deadline is reached with {self._done} of {self._total} tokens done", "the same command continues"
            )
