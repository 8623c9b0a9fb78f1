"""What is said of a result in a sentence or two."""

from fp8pack.engines.known import NAMES
from fp8pack.evaluation.encoder_evaluation import EncoderEvaluation, measures
from fp8pack.evaluation.evaluation import Evaluation
from fp8pack.evaluation.intervals import Interval
from fp8pack.evaluation.layer_evaluation import LayerEvaluation
from fp8pack.planning.calibration_summary import CalibrationSummary
from fp8pack.reading.inspection import Inspection
from fp8pack.report.quality import decibels
from fp8pack.units import format_size


def verdict_of_inspection(found: Inspection) -> list[str]:
    """Return what a checkpoint is, what its weights lost, and who loads it."""
    totals = found.totals
    if not totals.num_packed:
        return [f"No tensor of this checkpoint is FP8: {totals.num_tensors} tensors, {format_size(totals.nbytes)}."]
    size = f"{format_size(totals.nbytes)} instead of {format_size(totals.source_nbytes)}"
    said = [f"{totals.num_packed} of {totals.num_tensors} tensors are quantized: {size}."]
    if totals.num_spoiled:
        said.append(
            f"Do not use it: {totals.num_spoiled} of its weights have a NaN or infinity where numbers should be."
        )
    if totals.sqnr_min is not None and totals.sqnr_mean is not None:
        said.append(
            f"The SQNR of weights against the source is {decibels(totals.sqnr_mean, 2)} dB on average and "
            f"{decibels(totals.sqnr_min, 2)} dB at worst, over all elements."
        )
    loading = [NAMES[verdict.engine] for verdict in found.engines if verdict.tp]
    said.append(f"It loads in {', '.join(loading)}." if loading else "No engine that is known loads it as it is.")
    return said


def labels_of(found: Evaluation) -> list[str]:
    """Return a name for each checkpoint of an evaluation: its path if two have the same name."""
    names = [quality.checkpoint.name for quality in found.checkpoints]
    return names if len(set(names)) == len(names) and all(names) else [str(q.checkpoint) for q in found.checkpoints]


def verdict_of_evaluation(found: Evaluation) -> list[str]:
    """Return what FP8 cost the model, checkpoint by checkpoint."""
    return [
        f"{label}: KL divergence {quality.kl.value:.3g} "
        f"(95 % {quality.kl.low:.3g} to {quality.kl.high:.3g}), the same likeliest token at "
        f"{quality.top1.value:.1%} of positions, perplexity times {quality.ppl_ratio.value:.4f}."
        for label, quality in zip(labels_of(found), found.checkpoints, strict=True)
    ]


def verdict_of_encoders(found: EncoderEvaluation) -> list[str]:
    """Return what FP8 cost an encoder, checkpoint by checkpoint."""
    said = []
    for quality in found.checkpoints:
        values = ", ".join(f"{name.replace('_', ' ')} {value:.6g}" for name, value in measures(quality))
        said.append(f"{quality.checkpoint.name}: {values}.")
    return said


def spread(found: Interval, how: str) -> str:
    """Return a value and its interval."""
    return f"{found.value:{how}} ({found.low:{how}} to {found.high:{how}})"


def verdict_of_layers(found: LayerEvaluation) -> list[str]:
    """Return which parts cost most."""
    total = sum(part.kl.value for part in found.parts)
    first = found.worst[0]
    said = f"The {found.by} that costs most is {first.name}: KL divergence {first.kl.value:.3g}"
    share = f", {first.kl.value / total:.0%} of the sum over all {len(found.parts)}" if total else ""
    return [f"{said}{share}."]


def verdict_of_calibration(found: CalibrationSummary) -> list[str]:
    """Return what was seen, and whether it was enough."""
    said = [f"{found.num_prompts} prompts, {found.num_tokens} tokens, {found.num_sites} sites."]
    if found.growth_last_quarter is None:
        said.append("Too few prompts to tell whether ranges still grow.")
    elif found.num_growing or found.num_reached_late:
        said.append(
            f"Not settled: {found.num_growing} ranges still grew over the last quarter of the prompts, and "
            f"{found.num_reached_late} sites were first reached there. Add prompts."
        )
    else:
        said.append("Settled: no range grew by more than 1 % over the last quarter of the prompts.")
    if found.rare_experts:
        said.append(f"{len(found.rare_experts)} sites of experts saw too few tokens.")
    return said
