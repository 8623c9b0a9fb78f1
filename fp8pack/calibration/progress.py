"""Progress of a run: tokens done, the estimated time left, and the deadline."""

import time
from collections.abc import Callable

from fp8pack.calibration.open_run import Run
from fp8pack.calibration.options import FEWEST_PROMPTS
from fp8pack.units import format_seconds

_ESTIMATE_SECONDS = 3.0  # of run time before the estimate

OnProgress = Callable[[int, int], None]  # tokens done, tokens in all
OnNote = Callable[[str], None]


def ignore_progress(done: int, total: int) -> None:
    """Do nothing."""


def ignore_note(note: str) -> None:
    """Do nothing."""


class Progress:
    """Counts the tokens of a run; with streamed layers, a token counts once per layer, and once for the rest."""

    def __init__(self, run: Run, deadline: float | None, on_progress: OnProgress, on_note: OnNote) -> None:
        """`deadline`: in seconds of time.monotonic()."""
        self.total = run.num_tokens * (len(run.stack.layers) + 1 if run.stack else 1)
        self.done = 0
        self._run, self._deadline = run, deadline
        self._on_progress, self._on_note = on_progress, on_note
        self._began: float | None = None
        self._before: int | None = None

    def start(self, done: int) -> None:
        """Begin with this number of tokens, done by an earlier run."""
        self.done = done
        if done:
            self._on_note(f"resumed  {done} of {self.total} tokens were done")

    def tick(self, tokens: int) -> bool:
        """Count the tokens of a batch; return whether the deadline is reached."""
        now = time.monotonic()
        self.done += tokens
        if self._before is None:  # the first batch is a warm-up, skipped in the estimate
            self._before, self._began = self.done, now
        elif self._began is not None and now - self._began > _ESTIMATE_SECONDS:
            self._on_note(self._estimate((now - self._began) / (self.done - self._before)))
            self._began = None
        self._on_progress(self.done, self.total)
        return self._deadline is not None and now > self._deadline

    def _estimate(self, seconds_per_token: float) -> str:
        count = len(self._run.ids)
        left = format_seconds(seconds_per_token * (self.total - self.done))
        stages = f" through {len(self._run.stack.layers) + 1} stages" if self._run.stack else ""
        pace = f"{1 / seconds_per_token:.0f} a second"
        text = f"pace     {count} prompts, {self._run.num_tokens} tokens{stages} at {pace}: about {left} left"
        if count <= FEWEST_PROMPTS:
            return text
        fewer = format_seconds(seconds_per_token * self.total * FEWEST_PROMPTS / count)
        return f"{text}; {FEWEST_PROMPTS} prompts would take about {fewer} in all"
