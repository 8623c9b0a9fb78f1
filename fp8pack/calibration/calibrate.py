"""`calibrate`: makes a calibration file from a checkpoint and prompts."""

import resource
import time
from dataclasses import replace
from pathlib import Path

import torch

from fp8pack.calibration.calibration_journal import CalibrationJournal
from fp8pack.calibration.open_run import Run, open_run
from fp8pack.calibration.options import DEFAULT_PROMPTS, CalibrateOptions
from fp8pack.calibration.progress import OnNote, OnProgress, Progress, ignore_note, ignore_progress
from fp8pack.calibration.resident import CONVERGENCE_WINDOW, run_resident
from fp8pack.calibration.streamed import run_streamed
from fp8pack.checkpoint.calibration_file import read_calibration, write_calibration
from fp8pack.checkpoint.shard_writer import check_space, writing
from fp8pack.checkpoint.staging import Staging
from fp8pack.errors import DeadlineError, InputError, OutputError
from fp8pack.inputs import Duration, Texts, parse_path
from fp8pack.modelrun.loader import quiet_transformers
from fp8pack.modelrun.prompts import BUILT_IN
from fp8pack.planning.calibration import Calibration, has_converged
from fp8pack.planning.calibration_summary import CalibrationSummary, summarize


def calibrate(
    model: str | Path,
    output: str | Path | None = None,
    *,
    prompts: Texts = BUILT_IN,
    text_column: str | None = None,
    num_prompts: int = DEFAULT_PROMPTS,
    max_length: int | None = None,
    batch_size: int = 1,
    all_experts: bool = False,
    second_moments: str = "none",
    until_converged: bool = False,
    stream_layers: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    resume: bool = True,
    overwrite: bool = False,
    deadline: Duration | None = None,
    on_progress: OnProgress = ignore_progress,
    on_note: OnNote = ignore_note,
) -> CalibrationSummary:
    """Run a checkpoint in BF16 over prompts and write statistics of its activations.

    model: a directory, or the id of a repository in the hub cache. output: by default MODEL-calibration.safetensors.
    prompts: built-in, files (JSONL, Parquet, CSV, text) or data sets in the hub cache; mixed in turn.
    text_column: the column with the text or the conversation; by default the first known one.
    num_prompts: use 128 to 512. max_length: tokens per prompt; by default the model's limit, at most 2048.
    batch_size: prompts per forward pass. all_experts: also run every token through every expert.
    second_moments: none, or X^T X of the inputs of every weight, in blocks (diagonal, of 128 channels) or full, for
        compensated rounding.
    until_converged: stop when no amax has grown by more than 1 % over 64 prompts. stream_layers: keep one layer in
        memory at a time: on, off, or auto, if the weights exceed half of the free memory.
    device: auto, cpu or cuda. trust_remote_code: allow custom modeling code from the checkpoint.
    resume: continue unfinished work. overwrite: replace an existing output. deadline: such as "50m".
    on_progress: called with (tokens done, tokens in all). on_note: called with one line of text.

    Raises:
        RecipeError: an option is out of range, conflicts with another, or does not fit the model.
        InputError: the checkpoint, its tokenizer or the prompts are refused.
        OutputError: the output exists, is being written, or has an unfinished calibration of another model or options.
        SpaceError: no space left, or not writable. DeadlineError: the deadline was reached. The same call continues.
        DeviceError: torch finds no such device.
    """
    options = CalibrateOptions(
        output=output,
        prompts=prompts,
        text_column=text_column,
        num_prompts=num_prompts,
        max_length=max_length,
        batch_size=batch_size,
        all_experts=all_experts,
        second_moments=second_moments,
        until_converged=until_converged,
        stream_layers=stream_layers,
        device=device,
        trust_remote_code=trust_remote_code,
        resume=resume,
        overwrite=overwrite,
        deadline=deadline,
    )
    return run_calibration(parse_path("model", model), options, on_progress, on_note)


def run_calibration(
    model: Path, options: CalibrateOptions, on_progress: OnProgress = ignore_progress, on_note: OnNote = ignore_note
) -> CalibrationSummary:
    """Calibrate with checked options; raises as `calibrate` does."""
    with quiet_transformers(), torch.no_grad():
        return _calibrate(model, options, on_progress, on_note)


def _calibrate(model: Path, options: CalibrateOptions, on_progress: OnProgress, on_note: OnNote) -> CalibrationSummary:
    started = time.monotonic()
    run = open_run(model, options)
    for note in run.notes:
        on_note(f"note     {note}")
    staging = Staging(run.output)
    calibration = None if staging.leftovers else _finished(run)
    already_complete = calibration is not None
    if calibration is None:
        with staging:
            calibration = _finished(run)
            if calibration is not None:
                already_complete = True
                with writing(staging.journal):
                    staging.journal.unlink(missing_ok=True)  # of a run that was killed after its commit
            else:
                deadline = None if options.deadline is None else started + options.deadline
                calibration = _carry_out(run, staging, Progress(run, deadline, on_progress, on_note))
    return replace(
        summarize(calibration, output=run.output),
        notes=tuple(run.notes),
        model=run.source.name,
        architecture=run.source.facts.architecture,
        streamed=run.stack is not None,
        already_complete=already_complete,
        seconds=time.monotonic() - started,
        peak_memory=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def _finished(run: Run) -> Calibration | None:
    """The output, if it exists and is complete for these options."""
    if run.options.overwrite or not run.output.exists():
        return None
    try:
        found = read_calibration(run.output)
    except InputError:
        found = None
    complete = found is not None and (
        found.prompts == run.digests
        or (
            run.options.until_converged
            and found.prompts == run.digests[: len(found.prompts)]
            and has_converged([site.prompt_amax for site in found.sites], CONVERGENCE_WINDOW)
        )
    )
    if found is None or not complete or (found.fingerprint, found.options) != (run.source.fingerprint, run.decisive):
        raise OutputError(f"{run.output} exists", "choose another -o, or --overwrite replaces it")
    return found


def _carry_out(run: Run, staging: Staging, progress: Progress) -> Calibration:
    """Run the unfinished part, and rename the file to the output."""
    journal, result = CalibrationJournal(staging.journal), staging.content / run.output.name
    if not journal.resume(run.head, throw_away=not run.options.resume):
        staging.clear_content()
    if result.exists():  # an earlier run ended before its commit
        calibration = read_calibration(result)
    else:
        calibration = _run(run, staging, journal, progress)
        write_calibration(result, calibration)
        journal.add(max(journal.done, 1))
    staging.keep_only({result.name})
    staging.commit_file(overwrite=run.options.overwrite)
    return calibration


def _run(run: Run, staging: Staging, journal: CalibrationJournal, progress: Progress) -> Calibration:
    done = journal.done
    if run.stack is None:
        calibration = run_resident(run, staging.content, journal, progress)
    else:
        check_space(staging.folder, 2 * run.num_tokens * run.loader.hidden_nbytes)
        calibration = run_streamed(run, run.stack, staging.content, journal, progress)
    if calibration is not None:
        return calibration
    if journal.done == done:
        raise DeadlineError(
            "the deadline is reached before a layer was finished",
            "the same command continues; allow more time with --deadline",
        )
    raise DeadlineError(
        f"the deadline is reached with {progress.done} of {progress.total} tokens done", "the same command continues"
    )
