"""`evaluate`: what quantization cost a model, by its next-token distributions."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from fp8pack.bounds import Bound, parse_bounds
from fp8pack.errors import BoundError, InputError, RecipeError, VerificationError
from fp8pack.evaluation.divergence import Positions, compare_logits
from fp8pack.evaluation.evaluation import Evaluation
from fp8pack.evaluation.intervals import Bootstrap, Interval
from fp8pack.evaluation.models import load, open_loader
from fp8pack.evaluation.options import DEFAULT_TOKENS, FAIL_ON, EvalOptions
from fp8pack.evaluation.quality import quality_of
from fp8pack.evaluation.text import read_text
from fp8pack.gemm.device import choose_device
from fp8pack.inputs import Paths, Texts, parse_choice, parse_path, parse_paths
from fp8pack.modelfacts.spec import TORCH_NAMES
from fp8pack.modelrun.loader import quiet_transformers, read_tokenizer
from fp8pack.modelrun.prompts import HELD_OUT
from fp8pack.numerics.torch_dtypes import TORCH_DTYPES

METRICS = ("kl", "kl_median", "kl_p90", "kl_p99", "kl_p999", "ppl_ratio", "top1", "top5")

OnProgress = Callable[[int, int], None]


def evaluate(
    checkpoints: Paths,
    against: str | Path,
    *,
    text: Texts = HELD_OUT,
    text_column: str | None = None,
    num_tokens: int = DEFAULT_TOKENS,
    max_length: int | None = None,
    activations: str = "declared",
    dtype: str = "float32",
    device: str = "auto",
    trust_remote_code: bool = False,
    fail_if: Texts = (),
    fail_on: str = "interval",
    on_progress: OnProgress | None = None,
) -> Evaluation:
    """Run checkpoints and their source over the same text and compare their next-token distributions.

    checkpoints: FP8 or any other; several are compared with one run of the source. against: the source.
    text: `held-out` (bundled, 24 documents), files (JSONL, Parquet, CSV, text) or data sets in the hub cache.
    num_tokens: at most so many tokens of text. max_length: tokens of a window; by default the model's limit, at most
        2048.
    activations: how inputs of FP8 linears are quantized: `declared` by the checkpoint, `none`, `dynamic` or `static`.
    dtype: of everything else: float32 or bfloat16. device: auto, cpu or cuda; on a CPU FP8 products are computed from
        the same FP8 values in float32.
    fail_if: bounds such as "kl>0.01", of kl, kl_median, kl_p90, kl_p99, kl_p999, ppl_ratio, top1 and top5. fail_on:
        the worse end of the 95 % `interval`, or the `point`.
    on_progress: is told (tokens done, tokens in all).

    Raises:
        InputError: a checkpoint or a text is refused. RecipeError: an option is out of range.
        VerificationError: logits hold a NaN or infinity. BoundError: a bound is broken.
        DeviceError: torch finds no such device.
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
            end = interval.low if bound.sign == "<" else interval.high
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
    dtype = TORCH_DTYPES[TORCH_NAMES[options.dtype]]
    source, base = open_loader(against, dtype, device, trust_remote_code=options.trust_remote_code)
    tokenizer = read_tokenizer(source, trust_remote_code=options.trust_remote_code)
    length = base.length(options.max_length)
    given = read_text(options, tokenizer, length, device)
    notes = list(given.notes)
    for window in given.windows:
        base.check_tokens({given.names[window.document]: window.ids.tolist()})
    base.load_all()
    models = []
    for path in checkpoints:
        opened, loader = open_loader(path, dtype, device, trust_remote_code=options.trust_remote_code)
        model, mode, said = load(loader, opened, options.activations)
        models.append((model, mode))
        notes += said
    total = sum(len(window.ids) for window in given.windows)
    measured: list[list[Positions]] = [[] for _ in checkpoints]
    done = 0
    for window in given.windows:
        ids = window.ids[None]
        reference = _logits(base.model, ids, against)
        for (model, _), parts, path in zip(models, measured, checkpoints, strict=True):
            logits = _logits(model, ids, path)
            if logits.shape != reference.shape:
                sizes = f"{logits.shape[1]} tokens, and {against} {reference.shape[1]}"
                raise InputError(f"{path} has {sizes}: they are not of one model", "choose its source")
            parts.append(compare_logits(reference, logits, window.ids[1:]))
        done += len(window.ids)
        on_progress(done, total)
    bootstrap = Bootstrap(given.lengths)
    qualities = tuple(
        quality_of(path, mode, parts, given, bootstrap)
        for path, (_, mode), parts in zip(checkpoints, models, measured, strict=True)
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


def _logits(model: PreTrainedModel, ids: torch.Tensor, path: Path) -> torch.Tensor:
    """Logits [T - 1, V] of the tokens after each position but the last."""
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits[0, :-1]
    if not logits.isfinite().all():
        raise VerificationError(
            f"{path}: a logit is not a finite number", "`fp8pack verify` and `fp8pack inspect` look for the tensor"
        )
    return logits
