"""`recommend`: which scheme to take, by packing and evaluating each that the targets load."""

import shlex
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fp8pack.checkpoint.calibration_file import read_calibration
from fp8pack.checkpoint.shard_writer import writing
from fp8pack.checkpoint.source import beside, open_checkpoint
from fp8pack.errors import InputError, RecipeError
from fp8pack.evaluation.evaluate import run_evaluation
from fp8pack.evaluation.evaluation import Quality
from fp8pack.evaluation.options import LAYER_TOKENS, EvalOptions
from fp8pack.evaluation.progress import OnProgress
from fp8pack.evaluation.recommendation import Recommendation, SchemeOption
from fp8pack.inputs import Texts, parse_path, parse_texts
from fp8pack.modelrun.prompts import HELD_OUT
from fp8pack.packing.options import WriteOptions
from fp8pack.packing.prepare import prepare_pack
from fp8pack.packing.write import run
from fp8pack.planning.plan import PackPlan
from fp8pack.planning.recipe import SCHEMES, Request, Scheme

_SAME = "nearest"


def recommend(  # noqa: PLR0913
    model: str | Path,
    *,
    targets: Texts = (),
    calibration: str | Path | None = None,
    text: Texts = HELD_OUT,
    text_column: str | None = None,
    num_tokens: int | None = None,
    max_length: int | None = None,
    device: str = "auto",
    on_progress: OnProgress | None = None,
) -> Recommendation:
    """Pack a model by every scheme that the targets load, measure each against it, and say which to take.

    targets: engines; without one, every scheme is measured. calibration: the file of `fp8pack.calibrate`, for static
        activations and, with second moments, compensated rounding. text, text_column, num_tokens (4,096 by default),
        max_length, device: as in `evaluate`.

    Each is packed into a temporary directory, so there must be room for one copy at a time beside `model`.

    Raises:
        RecipeError: no target loads any scheme of this model. InputError: the model, the calibration or the text is
            refused. SpaceError: there is no room. DeviceError: torch finds no such device.
    """
    options = EvalOptions(
        text=text,
        text_column=text_column,
        num_tokens=LAYER_TOKENS if num_tokens is None else num_tokens,
        max_length=max_length,
        device=device,
    )
    engines = parse_texts("targets", targets, commas=True)
    statistics = None if calibration is None else parse_path("calibration", calibration)
    return run_recommend(parse_path("model", model), engines, statistics, options, on_progress)


@dataclass(frozen=True, slots=True)
class _Case:
    """A scheme as it would be asked for, and the plan of it, or why there is none."""

    scheme: Scheme
    request: Request
    plan: PackPlan | None = None
    problem: str = ""


def run_recommend(
    model: Path,
    targets: Sequence[str],
    calibration: Path | None,
    options: EvalOptions,
    on_progress: OnProgress | None = None,
) -> Recommendation:
    """Return what `recommend` does."""
    started, source = time.monotonic(), open_checkpoint(model)
    place = beside(source, ".fp8pack-recommend")
    cases = [_plan(model, case, place) for case in _cases(targets, calibration)]
    runnable = [case for case in cases if case.plan is not None]
    if not runnable:
        raise RecipeError(f"no scheme of {source.name} can be packed for these targets: {cases[0].problem}")
    measured: list[Quality] = []
    tokens, notes = 0, []
    for i, case in enumerate(runnable):
        with writing(place.parent):
            working = tempfile.TemporaryDirectory(dir=place.parent, prefix=f"{place.name}-")
        with working as folder:
            run(prepare_pack(model, case.request, WriteOptions(Path(folder) / "out")))

            def tell(done: int, total: int, i: int = i) -> None:
                if on_progress is not None:
                    on_progress(i * total + done, len(runnable) * total)

            found = run_evaluation([Path(folder) / "out"], source.path, options, tell)
        measured.append(found.checkpoints[0])
        tokens, notes = found.num_tokens, list(found.notes)
    both = sorted(zip(runnable, measured, strict=True), key=lambda pair: pair[1].kl.value)
    best, quality = _choose(both)
    rows = [_option(case, case.plan, found) for case, found in both]
    rows += [_option(case, None, None) for case in cases if case.plan is None]
    return Recommendation(
        source=source.path,
        targets=tuple(best.request.targets),
        text=options.text,
        num_tokens=tokens,
        options=tuple(rows),
        take=_name(best),
        why=_why(best, quality, both),
        command=_command(model, best, targets, calibration),
        notes=tuple(notes),
        seconds=time.monotonic() - started,
    )


def _cases(targets: Sequence[str], calibration: Path | None) -> list[_Case]:
    has_moments = calibration is not None and any(site.moments for site in read_calibration(calibration).sites)
    cases = []
    for scheme in SCHEMES:
        needs = scheme.activations == "static"
        if needs and calibration is None:
            cases.append(_Case(scheme, Request(scheme.name, targets=targets), problem="it needs a calibration"))
            continue
        cases.append(_Case(scheme, Request(scheme.name, targets=targets, calibration=calibration if needs else None)))
        if has_moments:
            asked = Request(scheme.name, targets=targets, calibration=calibration, rounding="compensated")
            cases.append(_Case(scheme, asked))
    return cases


def _plan(model: Path, case: _Case, output: Path) -> _Case:
    if case.problem:
        return case
    try:
        plan = prepare_pack(model, case.request, WriteOptions(output)).plan
    except RecipeError as error:
        return replace(case, problem=str(error))
    except InputError as error:
        if case.request.calibration is None:
            raise
        return replace(case, problem=str(error))  # the calibration lacks something that this scheme needs
    return replace(case, plan=plan if isinstance(plan, PackPlan) else None)


def _choose(both: Sequence[tuple[_Case, Quality]]) -> tuple[_Case, Quality]:
    """The least KL divergence among those that multiply in FP8; W8A16 only if nothing else is loaded."""
    in_fp8 = [pair for pair in both if pair[0].scheme.activations != "none"]
    return (in_fp8 or both)[0]


def _why(best: _Case, quality: Quality, both: Sequence[tuple[_Case, Quality]]) -> str:
    in_fp8 = [pair for pair in both if pair[0].scheme.activations != "none"]
    if not in_fp8:
        return f"the least KL divergence, {quality.kl.value:.3g}; activations stay as they are"
    why = f"the least KL divergence with FP8 products, {quality.kl.value:.3g}"
    close = [_name(case) for case, other in in_fp8 if case is not best and other.kl.low <= quality.kl.high]
    return f"{why}; within its interval: {', '.join(close)}" if close else why


def _name(case: _Case) -> str:
    return case.scheme.name + (" compensated" if case.request.rounding != _SAME else "")


def _command(model: Path, case: _Case, targets: Sequence[str], calibration: Path | None) -> str:
    words = ["fp8pack", "pack", str(model), "--scheme", case.scheme.name]
    words += ["--target", ",".join(targets)] if targets else []
    words += ["--rounding", case.request.rounding] if case.request.rounding != _SAME else []
    words += ["--calibration", str(calibration)] if case.request.calibration is not None else []
    return shlex.join(words)


def _option(case: _Case, plan: PackPlan | None, found: Quality | None) -> SchemeOption:
    return SchemeOption(
        scheme=case.scheme.name,
        activations=case.scheme.activations,
        rounding=case.request.rounding,
        nbytes=plan.output_nbytes if plan else None,
        kl=found.kl if found else None,
        top1=found.top1 if found else None,
        problem=case.problem,
    )
