"""The whole model in memory: one batch after the other through all of it."""

import time
from collections.abc import Callable
from pathlib import Path

from fp8pack.calibrate.observers import Observation
from fp8pack.calibrate.prepare import Run
from fp8pack.calibrate.state import Journal
from fp8pack.checkpoint.calibration_file import read_calibration, write_calibration
from fp8pack.planning.calibration import Calibration, has_converged

_CONVERGENCE_WINDOW = 64
_SAVE_SHARE = 50  # a save may cost one part in so many of the time since the last


def run_resident(
    run: Run, folder: Path, journal: Journal, done: int, *, tick: Callable[[int], bool]
) -> Calibration | None:
    """Run every batch from `done` on; return None if `tick` said to stop.

    folder: where the state is saved, at the end of a batch, as often as it costs next to nothing.
    tick: told the tokens of each batch; says whether to stop.
    """
    run.loader.load_all()
    state = folder / "state.safetensors"
    observation = Observation(run.loader.model, run.loader.names, all_experts=run.options.all_experts)
    if done:
        observation.restore(read_calibration(state))
    fingerprint, options = run.source.fingerprint, run.decisive
    saved, cost = time.monotonic(), 0.0
    batches = list(run.batches())
    with observation:
        for index, (tokens, call) in enumerate(batches[done:], done + 1):
            run.loader.model(**call)
            stopped = tick(tokens)
            converged = run.options.until_converged and has_converged(observation.prompt_amax(), _CONVERGENCE_WINDOW)
            if index == len(batches) or converged:
                break
            if stopped or time.monotonic() - saved > _SAVE_SHARE * cost:
                started = time.monotonic()
                write_calibration(state, observation.calibration(fingerprint, options))
                journal.add(index)
                saved = time.monotonic()
                cost = saved - started
            if stopped:
                return None
    return observation.calibration(fingerprint, options)
