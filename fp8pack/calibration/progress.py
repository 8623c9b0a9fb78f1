"""How far a run is, when it will end, and whether its time is up."""

import time
from collections.abc import Callable

from fp8pack.calibration.prepare import FEWEST_PROMPTS, Run
from fp8pack.units import format_seconds

_ESTIMATE_SECONDS = 1.0  # after which the pace is known

OnProgress = Callable[[int, int], None]  # tokens done, tokens in all
OnNote = Callable[[str], None]


class Progress:
    """Counts the tokens of a run; streamed, a token counts once for each layer, and once for the rest."""

    def __init__(self, run: Run, deadline: float | None, on_progress: OnProgress, on_note: OnNote) -> None:
        """`deadline`: in the seconds of time.monotonic()."""
        self.total = run.num_tokens * (len(run.stack.layers) + 1 if run.stack else 1)
        self.done = 0
        self._run, self._deadline = run, deadline
        self._on_progress, self._on_note = on_progress, on_note
        self._began: float | None = None
        self._before = 0

    def start(self, done: int) -> None:
        """Let the clock run from here, with so many tokens done by an earlier run."""
        self.done = self._before = done
        self._began = time.monotonic()

    def tick(self, tokens: int) -> bool:
        """Count the tokens of a batch; say whether the deadline has come."""
        now = time.monotonic()
        self.done += tokens
        if self._began is not None and now - self._began > _ESTIMATE_SECONDS:
            self._on_note(self._estimate((now - self._began) / (self.done - self._before)))
            self._began = None
        self._on_progress(self.done, self.total)
        return self._deadline is not None and now > self._deadline

    def _estimate(self, seconds_per_token: float) -> str:
        count = len(self._run.ids)
        left = format_seconds(seconds_per_token * (self.total - self.done))
        text = (
            f"pace     {count} prompts, {self.total} tokens at {1 / seconds_per_token:.0f} a second: about {left} left"
        )
        if count <= FEWEST_PROMPTS:
            return text
        fewer = format_seconds(seconds_per_token * self.total * FEWEST_PROMPTS / count)
        return f"{text}; {FEWEST_PROMPTS} prompts would take about {fewer} in all"
