"""`calibrate`: a checkpoint and prompts in, a calibration file out."""

import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fp8pack.calibrate.model import quiet_transformers
from fp8pack.calibrate.prepare import FEWEST_PROMPTS, CalibrateOptions, Run, prepare
from fp8pack.calibrate.resident import run_resident
from fp8pack.calibrate.state import Journal
from fp8pack.calibrate.streamed import run_streamed
from fp8pack.checkpoint.calibration_file import read_calibration, write_calibration
from fp8pack.checkpoint.shard_writer import check_space
from fp8pack.checkpoint.staging import Staging
from fp8pack.errors import DeadlineError, InputError, OutputError
from fp8pack.planning.calibration import Calibration
from fp8pack.planning.calibration_facts import calibration_facts
from fp8pack.units import format_seconds

OnProgress = Callable[[int, int], None]  # tokens done, tokens in all
OnNote = Callable[[str], None]


def calibrate(
    model: str | Path,
    options: CalibrateOptions | None = None,
    *,
    on_progress: OnProgress = lambda done, total: None,
    on_note: OnNote = lambda note: None,
) -> dict[str, Any]:
    """Run a checkpoint in BF16 over prompts and write the statistics; return what `fp8pack calibrate --json` prints.

    model: a directory, or the id of a repository in the hub cache.

    Raises:
        RecipeError: an option cannot be carried out.
        InputError: the checkpoint, its tokenizer or the prompts are refused.
        OutputError: the output exists, is being written, or holds an unfinished calibration of something else.
        SpaceError, DeadlineError: what is finished is kept, and the same call continues.
    """
    with quiet_transformers(), torch.no_grad():
        return _calibrate(Path(model), options or CalibrateOptions(), on_progress, on_note)


def _calibrate(model: Path, options: CalibrateOptions, on_progress: OnProgress, on_note: OnNote) -> dict[str, Any]:
    started = time.monotonic()
    run = prepare(model, options)
    for note in run.notes:
        on_note(note)
    calibration = _finished(run)
    already_complete = calibration is not None
    if calibration is None:
        with Staging(run.output) as staging:
            calibration = _carry_out(run, staging, _Progress(run, staging, started, on_progress, on_note))
            staging.keep_only(())
            write_calibration(staging.content / run.output.name, calibration)
            staging.commit_file(overwrite=run.options.overwrite)
    return {
        "schema": 1,
        "model": run.source.name,
        "architecture": run.source.facts.architecture,
        **calibration_facts(calibration),
        "output": str(run.output),
        "streamed": run.stack is not None,
        "already_complete": already_complete,
        "seconds": time.monotonic() - started,
        "peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "notes": list(run.notes),
    }


class _Progress:
    """Counts tokens, tells of them, and knows when the deadline has come."""

    def __init__(self, run: Run, staging: Staging, started: float, on_progress: OnProgress, on_note: OnNote) -> None:
        self.total = run.num_tokens * (len(run.stack.layers) + 1 if run.stack else 1)
        self.done = 0
        self._run, self._staging = run, staging
        self._on_progress, self._on_note = on_progress, on_note
        self._first: float | None = None
        self._began = time.monotonic()
        limit = run.options.deadline_seconds
        self._deadline = None if limit is None else started + limit

    def skip(self, tokens: int) -> None:
        """Count tokens that an earlier run has done."""
        self.done += tokens

    def start(self) -> None:
        """Let the clock run from here."""
        self._began = time.monotonic()

    def tick(self, tokens: int) -> bool:
        """Count the tokens of a batch; say whether the deadline has come."""
        self.done += tokens
        if self._first is None:
            self._first = (time.monotonic() - self._began) / tokens
            self._on_note(self._estimate(self._first))
        self._staging.beat()
        self._on_progress(self.done, self.total)
        return self._deadline is not None and time.monotonic() > self._deadline

    def _estimate(self, seconds_per_token: float) -> str:
        count = len(self._run.ids)
        left = format_seconds(seconds_per_token * (self.total - self.done))
        text = (
            f"{count} prompts, {self._run.num_tokens} tokens, {1 / seconds_per_token:.0f} tokens/s: about {left} left"
        )
        if count <= FEWEST_PROMPTS:
            return text
        fewer = format_seconds(seconds_per_token * self.total * FEWEST_PROMPTS / count)
        return f"{text}; {FEWEST_PROMPTS} prompts would take about {fewer}"


def _finished(run: Run) -> Calibration | None:
    """The output, if it is there and is what this command would write."""
    if run.options.overwrite or not run.output.exists():
        return None
    try:
        found = read_calibration(run.output)
    except InputError:
        found = None
    complete = found is not None and (
        found.prompts == run.digests
        or (run.options.until_converged and found.prompts == run.digests[: len(found.prompts)])
    )
    if found is None or not complete or (found.fingerprint, found.options) != (run.source.fingerprint, run.decisive):
        raise OutputError(f"{run.output} exists: choose another -o, or --overwrite replaces it")
    return found


def _carry_out(run: Run, staging: Staging, progress: _Progress) -> Calibration:
    journal = Journal(staging.journal)
    done = journal.resume(run.head, throw_away=not run.options.resume)
    if done == 0:
        staging.clear_content()
    if run.stack is None:
        progress.skip(sum(tokens for tokens, _ in list(run.batches())[:done]))
        calibration = run_resident(run, staging.content, journal, done, tick=progress.tick)
    else:
        progress.skip(run.num_tokens * done)
        check_space(staging.folder, 2 * run.num_tokens * run.loader.hidden_nbytes)
        calibration = run_streamed(run, run.stack, staging.content, journal, done, tick=progress.tick)
    if calibration is None:
        raise DeadlineError(
            f"the deadline is reached with {progress.done} of {progress.total} tokens done; the same command continues"
        )
    return calibration
