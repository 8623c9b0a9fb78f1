"""Calibration with the whole model in memory: batch by batch through all layers."""

import time
from pathlib import Path

from fp8pack.calibration.calibration_journal import CalibrationJournal
from fp8pack.calibration.observers import Observation
from fp8pack.calibration.open_run import Run
from fp8pack.calibration.progress import Progress
from fp8pack.checkpoint.calibration_file import read_calibration, write_calibration
from fp8pack.planning.calibration import Calibration, has_converged

CONVERGENCE_WINDOW = 64
_SAVE_SHARE = 50  # saving takes at most 1/50 of the time


def run_resident(run: Run, folder: Path, journal: CalibrationJournal, progress: Progress) -> Calibration | None:
    """Run every batch that is not done; return None if the deadline is reached.

    folder: where the state is saved after a batch, if saving takes a small share of the time.
    """
    run.loader.load_all()
    state = folder / "state.safetensors"
    observation = Observation(
        run.loader.model,
        run.loader.names,
        all_experts=run.options.all_experts,
        second_moments=run.options.second_moments,
    )
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
