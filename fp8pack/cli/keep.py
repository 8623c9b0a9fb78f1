"""What `pack --keep` does before it packs: measure each weight, choose, and correct by a second measurement."""

import os
import tempfile
from pathlib import Path

from fp8pack.checkpoint.shard_writer import writing
from fp8pack.cli.output import say
from fp8pack.packing.keep import prepare_keeping, read_sensitivity
from fp8pack.packing.options import WriteOptions
from fp8pack.packing.prepare import Prepared, prepare_pack
from fp8pack.packing.write import run
from fp8pack.planning.keep import parse_budget
from fp8pack.planning.recipe import Request
from fp8pack.quiet import quiet_imports


def keep_within(
    model: Path, request: Request, options: WriteOptions, keep: str, sensitivity: Path | None, *, quiet: bool
) -> Prepared:
    """Return the plan of a pack that keeps weights within a budget.

    sensitivity: what they cost; without it each linear is measured alone, and the choice as a whole after it.
    """
    budget = parse_budget(keep)
    if sensitivity is not None:
        return prepare_keeping(model, request, options, budget, read_sensitivity(sensitivity))
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # torch's threads spin, and starve all others on a shared machine
    with quiet_imports():
        from fp8pack.evaluation import evaluate, evaluate_layers  # torch, transformers: seconds
    from fp8pack.evaluation.options import LAYER_TOKENS, EvalOptions
    from fp8pack.report.progress import EVALUATING, showing_progress

    place = prepare_pack(model, request, options)
    given = EvalOptions(num_tokens=LAYER_TOKENS)
    beside = place.output.parent
    with writing(beside):
        working = tempfile.TemporaryDirectory(dir=beside, prefix=f".{place.output.name}.fp8pack-keep-")
    with working as folder:
        every, chosen = Path(folder) / "every", Path(folder) / "chosen"
        run(prepare_pack(model, request, WriteOptions(every)))
        with showing_progress(EVALUATING, quiet) as on_progress:
            found = evaluate_layers.run_layers(every, place.source.path, "linear", given, on_progress).to_dict()
        first = prepare_keeping(model, request, WriteOptions(chosen), budget, found)
        run(first)
        with showing_progress(EVALUATING, quiet) as on_progress:
            measured = evaluate.run_evaluation([every, chosen], place.source.path, given, on_progress)
    before, after = (quality.kl.value for quality in measured.checkpoints)
    predicted = first.choice.chosen.kl if first.choice else 0.0
    if not quiet:
        say(
            f"measured KL {before:.3g} with every weight in FP8, {after:.3g} with the choice, {predicted:.3g} predicted"
        )
    factor = after / predicted if predicted > 0 else 1.0
    return prepare_keeping(model, request, options, budget, found, factor)
