"""`evaluate`: what quantization cost a model, by its next-token distributions."""

import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from blake3 import blake3

from fp8pack.bounds import Bound, parse_bounds
from fp8pack.errors import BoundError, InputError, RecipeError
from fp8pack.evaluation.base_file import base_facts, check_new, load_base, save_base
from fp8pack.evaluation.divergence import Positions, compare_logits
from fp8pack.evaluation.evaluation import Evaluation
from fp8pack.evaluation.intervals import Bootstrap, Interval
from fp8pack.evaluation.kv_cache import simulating_kv_cache
from fp8pack.evaluation.models import Opened, open_packed, open_source
from fp8pack.evaluation.options import FAIL_ON, EvalOptions
from fp8pack.evaluation.progress import OnProgress, Progress
from fp8pack.evaluation.quality import quality_of
from fp8pack.evaluation.run import Resident, Run, Streamed
from fp8pack.evaluation.text import Text, read_text
from fp8pack.evaluation.working_folder import working_folder
from fp8pack.gemm.device import choose_device, free_memory
from fp8pack.inputs import Duration, Paths, Texts, parse_choice, parse_path, parse_paths
from fp8pack.modelfacts.spec import TORCH_NAMES
from fp8pack.modelrun.loader import quiet_transformers, read_tokenizer
from fp8pack.modelrun.prompts import HELD_OUT
from fp8pack.modelrun.stream_layers import Stack, open_stack, return_memory_at_once
from fp8pack.numerics.torch_dtypes import TORCH_DTYPES

METRICS = ("kl", "kl_median", "kl_p90", "kl_p99", "kl_p999", "ppl_ratio", "top1", "top5")


def evaluate(
    checkpoints: Paths,
    against: str | Path,
    *,
    text: Texts = HELD_OUT,
    text_column: str | None = None,
    num_tokens: int | None = None,
    max_length: int | None = None,
    activations: str = "declared",
    dtype: str = "float32",
    device: str = "auto",
    trust_remote_code: bool = False,
    stream_layers: str = "auto",
    base: str | Path | None = None,
    save_base: str | Path | None = None,
    state: str | Path | None = None,
    deadline: Duration | None = None,
    fail_if: Texts = (),
    fail_on: str = "interval",
    on_progress: OnProgress | None = None,
) -> Evaluation:
    """Run checkpoints and their source over the same text and compare their next-token distributions.

    checkpoints: FP8 or any other; several are compared with one run of the source. against: the source.
    text: `held-out` (bundled, 24 documents), files (JSONL, Parquet, CSV, text) or data sets in the hub cache.
    num_tokens: at most so many tokens of text, 32,768 by default. max_length: tokens of a window; by default the
        model's limit, at most 2048.
    activations: how inputs of FP8 linears are quantized: `declared` by the checkpoint, `none`, `dynamic` or `static`.
    dtype: of everything else: float32 or bfloat16. device: auto, cpu or cuda; on a CPU FP8 products are computed from
        the same FP8 values in float32.
    stream_layers: keep one decoder layer in memory at a time: on, off, or auto, if the weights exceed half of the free
        memory. save_base: write the source's last hidden states to this file; base: use them, so that the source's
        layers are not run again.
    state: a directory that keeps finished layers: the same call continues after a deadline, such as "50m", or a kill.
    fail_if: bounds such as "kl>0.01", of kl, kl_median, kl_p90, kl_p99, kl_p999, ppl_ratio, top1 and top5. fail_on:
        the worse end of the 95 % `interval`, or the `point`.
    on_progress: is told (tokens done, tokens in all).

    A model that predicts no next token is for `evaluate_encoder`.

    Raises:
        InputError: a checkpoint or a text is refused. RecipeError: an option is out of range.
        VerificationError: logits hold a NaN or infinity. BoundError: a bound is broken.
        OutputError: save_base exists, or another process uses the state. SpaceError: no space left, or not writable.
        DeadlineError: the deadline was reached. DeviceError: torch finds no such device.
    """
    options = EvalOptions(
        text=text,
        text_column=text_column,
        num_tokens=num_tokens,
        max_length=max_length,
        activations=activations,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        stream_layers=stream_layers,
        base=base,
        save_base=save_base,
        state=state,
        deadline=deadline,
    )
    bounds, found_on = parse_bounds(fail_if, METRICS), parse_choice("fail_on", fail_on, FAIL_ON)
    paths = parse_paths("checkpoints", checkpoints)
    if not paths:
        raise RecipeError("there is no checkpoint to evaluate", "name one or more")
    found = run_evaluation(paths, parse_path("against", against), options, on_progress)
    check_bounds(found, bounds, found_on)
    return found


def run_evaluation(
    checkpoints: Sequence[Path], against: Path, options: EvalOptions, on_progress: OnProgress | None = None
) -> Evaluation:
    """Return what `evaluate` does, without checking bounds."""
    with quiet_transformers(), torch.no_grad():
        return _evaluate(checkpoints, against, options, on_progress or (lambda done, total: None))


def check_bounds(found: Evaluation, bounds: Sequence[Bound], fail_on: str) -> None:
    """Raise BoundError for the first bound that is broken, by the worse end of the interval or by the value."""
    for quality in found.checkpoints:
        for bound in bounds:
            interval: Interval = getattr(quality, bound.metric)
            end = interval.high if bound.is_upper else interval.low
            value = interval.value if fail_on == "point" else end
            if bound.is_broken_by(value):
                ends = f"95 % {interval.low:.3g} to {interval.high:.3g}"
                worst = f"; the worst document is {quality.worst_documents[0].name}"
                raise BoundError(
                    f"{bound.metric} of {quality.checkpoint} is {interval.value:.3g} ({ends}), which is {bound.sign} "
                    f"{bound.value:g}{worst}"
                )


def _evaluate(checkpoints: Sequence[Path], against: Path, options: EvalOptions, on_progress: OnProgress) -> Evaluation:
    started, device = time.monotonic(), choose_device(options.device)
    dtype, trust = TORCH_DTYPES[TORCH_NAMES[options.dtype]], options.trust_remote_code
    if options.save_base is not None:
        check_new(options.save_base)
    if options.stream_layers == "on" or options.state is not None:
        return_memory_at_once()
    base = open_source(against, dtype, device, trust_remote_code=trust)
    base.check_predicts()
    tokenizer = read_tokenizer(base.source, trust_remote_code=trust)
    length = base.loader.length(options.max_length)
    given = read_text(options, tokenizer, length, device)
    for window in given.windows:
        base.loader.check_tokens({given.names[window.document]: window.ids.tolist()})
    others = [open_packed(path, dtype, device, options.activations, trust_remote_code=trust) for path in checkpoints]
    for opened in others:
        opened.check_predicts()
    notes = [*given.notes, *(note for opened in others for note in opened.notes)]
    with ExitStack() as stack:
        for opened in others:
            notes += stack.enter_context(simulating_kv_cache(opened))
        folder = stack.enter_context(working_folder(options.state, _key(base, others, given, options)))
        runs, said = _choose_runs([base, *others], options, folder)
        notes += said
        deadline = None if options.deadline is None else started + options.deadline
        progress = Progress(given.num_tokens * sum(run.stages for run in runs), deadline, on_progress)
        if isinstance(runs[0], Streamed):
            _use_base(runs[0], options, given)
        for run in runs:
            run.prepare(given.windows, progress.tick)
            if run is runs[0] and isinstance(run, Streamed) and options.save_base is not None:
                facts = base_facts(base.source.fingerprint, given.windows, options.dtype)
                save_base(options.save_base, run.last_hidden_path, facts, run.shape(given.num_tokens))
        measured = _measure(runs, given, stack, progress)
    bootstrap = Bootstrap(given.lengths)
    qualities = tuple(
        quality_of(opened.path, opened.activations, parts, given, bootstrap)
        for opened, parts in zip(others, measured, strict=True)
    )
    return Evaluation(
        source=against,
        text=options.text,
        num_documents=len(given.names),
        num_tokens=sum(given.lengths),
        max_length=length,
        dtype=options.dtype,
        perplexity=bootstrap.mean(Positions.joined(measured[0]).base_loss, np.exp),
        checkpoints=qualities,
        notes=tuple(notes),
        seconds=time.monotonic() - started,
    )


def _measure(runs: Sequence[Run], given: Text, stack: ExitStack, progress: Progress) -> list[list[Positions]]:
    """Compare the logits of every window; return what was measured of each run but the first, the source's."""
    base, *others = runs
    predict, *predictions = [stack.enter_context(run.predicting()) for run in runs]
    measured: list[list[Positions]] = [[] for _ in others]
    for window in given.windows:
        reference = predict(window.ids)
        for run, other, parts in zip(others, predictions, measured, strict=True):
            logits = other(window.ids)
            if logits.shape != reference.shape:
                sizes = f"{logits.shape[1]} tokens, and {base.opened.path} {reference.shape[1]}"
                raise InputError(f"{run.opened.path} has {sizes}: they are not of one model", "choose its source")
            parts.append(compare_logits(reference, logits, window.ids[1:]))
        progress.tick(len(window.ids) * len(runs))
    return measured


def _key(base: Opened, others: Sequence[Opened], given: Text, options: EvalOptions) -> str:
    """What hidden states depend on, as one digest."""
    facts = [base_facts(base.source.fingerprint, given.windows, options.dtype), options.activations, options.device]
    return blake3(json.dumps([facts, [opened.source.fingerprint for opened in others]]).encode()).hexdigest()


def _choose_runs(models: Sequence[Opened], options: EvalOptions, folder: Path) -> tuple[list[Run], list[str]]:
    """Decide how each model is run; return the notes on those whose layers cannot be streamed.

    Raises:
        InputError: a base or a state is asked for, and layers cannot be streamed.
    """
    device = models[0].loader.device
    needed = sum(opened.loader.weight_nbytes for opened in models)
    large = options.stream_layers == "auto" and 2 * needed > free_memory(device)
    all_streamed = options.stream_layers == "on" or options.state is not None or large
    runs: list[Run] = []
    notes = []
    for i, opened in enumerate(models):
        has_base = i == 0 and (options.base is not None or options.save_base is not None)
        stack: Stack | str = ""
        if all_streamed or has_base:
            stack = open_stack(opened.model, opened.load, device)
        if isinstance(stack, Stack):
            runs.append(Streamed(opened, stack, folder / f"model-{i}"))
            continue
        if has_base or (stack and options.state is not None):
            raise InputError(f"{opened.path}: {stack}, so its layers cannot be streamed", "leave out base and state")
        if stack:
            notes.append(f"{opened.path} is loaded whole, not one layer at a time: {stack}")
        runs.append(Resident(opened))
    return runs, notes


def _use_base(run: Streamed, options: EvalOptions, given: Text) -> None:
    """Take the source's last hidden states from the base, if there is one."""
    if options.base is not None:
        facts = base_facts(run.opened.source.fingerprint, given.windows, options.dtype)
        load_base(options.base, facts, run.last_hidden_path, run.shape(given.num_tokens))
        run.skip_layers()
