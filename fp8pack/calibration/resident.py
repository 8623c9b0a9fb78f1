"""The whole model in memory: one batch after the other through all of it."""

import time
from pathlib import Path

from fp8pack.calibration.calibration_journal import CalibrationJournal
from fp8pack.calibration.observers import Observation
from fp8pack.calibration.open_run import Run
from fp8pack.calibration.progress import Progress
from fp8pack.checkpoint.calibration_file import read_calibration, write_calibration
from fp8pack.planning.calibration import Calibration, has_converged

CONVERGENCE_WINDOW = 64
_SAVE_SHARE = 50  # a save may cost one part in so many of the time since the last


def run_resident(run: Run, folder: Path, journal: CalibrationJournal, progress: Progress) -> Calibration | None:
    """Run every batch that is not done; return None if the deadline came.

    folder: where the state is saved, at the end of a batch, as often as it costs next to nothing.
    """
    run.loader.load_all()
    state = folder / "state.safetensors"
    observation = Observation(run.loader.model, run.loader.names, all_experts=run.options.all_experts)
    done = 0
    if journal.done:
        observation.restore(read_calibration(state))
        done = -(-len(observation.prompts) // run.options.batch_size)  # the state may be ahead of the journal
    fingerprint, options = run.source.fingerprint, run.decisive
    saved, cost = time.monotonic(), 0.0
    batches = list(run.batches())
    progress.start(sum(tokens for tokens, _ in batches[:done]))
    with run.loader.without_logits(), observation:
        for index, (tokens, call) in enumerate(batches[done:], done + 1):
            run.loader.model(**call)
            stopped = progress.tick(tokens)
            converged = run.options.until_converged and has_converged(observation.prompt_amax(), CONVERGENCE_WINDOW)
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
