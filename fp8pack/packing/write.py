"""Carrying out what is prepared: the whole output is made in a staging directory, and one rename makes it real."""

import json
import resource
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any

from fp8pack.checkpoint.journal import Journal, read_head
from fp8pack.checkpoint.shard_writer import check_space, writing
from fp8pack.checkpoint.staging import Staging
from fp8pack.checkpoint.whole import check_whole
from fp8pack.errors import DeadlineError, InputError, OutputError, VerificationError
from fp8pack.machine import usable_cores
from fp8pack.packing.bands import Band
from fp8pack.packing.codecs import make_codec
from fp8pack.packing.execute import Execution, plan_work
from fp8pack.packing.metadata import (
    CardSection,
    card_notes,
    describes,
    manifest_path,
    side_files_to_copy,
    write_metadata,
)
from fp8pack.packing.prepare import Prepared
from fp8pack.packing.result import PackResult, Written, make_result, summarize_sqnr
from fp8pack.packing.side_work import SideWork
from fp8pack.packing.sqnr import sqnr_of
from fp8pack.packing.workers import Stop
from fp8pack.regular_files import read_regular
from fp8pack.units import format_size

_BASE_MEMORY = 100 << 20  # interpreter and libraries

OnProgress = Callable[[int, int], None]  # bytes gone through, bytes in all, side files included


def run(
    prepared: Prepared,
    on_progress: OnProgress | None = None,
    *,
    dry_run: bool = False,
    card_section: CardSection | None = None,
) -> PackResult:
    """Carry out what is prepared, or in a dry run check that it can be; raises as `carry_out` does."""
    if dry_run:
        check(prepared)
        return make_result(prepared, every_tensor=True)
    return make_result(prepared, carry_out(prepared, on_progress or (lambda done, total: None), card_section))


def check(prepared: Prepared) -> None:
    """Raise what `carry_out` would raise before its first byte; nothing is written."""
    options, staging = prepared.options, Staging(prepared.output)
    if not options.overwrite and not staging.leftovers and _finished_root(prepared):
        return
    make_codec(options.device)
    staging.check_free()
    if prepared.output.exists() and not options.overwrite and not _is_half_committed(prepared, staging):
        raise _exists(prepared)
    if staging.journal.exists() and options.resume:
        _check_same(prepared, read_head(staging.journal), staging)
    else:
        files = sum(work.size for work in plan_work(prepared.plan, prepared.source))
        check_space(prepared.output.parent, files + _side_nbytes(prepared))


def carry_out(
    prepared: Prepared,
    on_progress: OnProgress = lambda done, total: None,
    card_section: CardSection | None = None,
) -> Written:
    """Write the checkpoint; a finished one of the same source and recipe is left as it is.

    card_section: called with the staged directory before it is committed; what it returns goes into the model card.

    Raises:
        OutputError: the output exists, is being written, or holds unfinished work of another recipe.
        SpaceError, InputError, DeadlineError: what is finished is kept, and the same call continues.
    """
    started = time.monotonic()
    options, staging = prepared.options, Staging(prepared.output)
    if not options.overwrite and not staging.leftovers and (root := _finished_root(prepared)):
        return Written(root, True, time.monotonic() - started)
    codec = make_codec(options.device, options.sizes.strip)
    stop = Stop(deadline=None if options.deadline is None else started + options.deadline)
    with staging:
        half_committed = _is_half_committed(prepared, staging)
        if not options.overwrite and not half_committed and (root := _finished_root(prepared)):
            with writing(staging.journal):
                staging.journal.unlink(missing_ok=True)  # left by a run that was cut off after its commit
            return Written(root, True, time.monotonic() - started)
        if prepared.output.exists() and not options.overwrite and not half_committed:
            raise _exists(prepared)
        with closing(Journal(staging.journal)) as journal:
            sides = tuple(SideWork(side) for side in side_files_to_copy(prepared))
            execution = Execution(
                *(prepared.plan, prepared.source, sides),
                folder=staging.content,
                journal=journal,
                checkpoint_nbytes=options.sizes.checkpoint,
            )
            _resume(prepared, execution, journal, staging)
            check_space(staging.folder, execution.remaining_nbytes())

            def tick() -> None:
                on_progress(execution.counters.done_nbytes, execution.counters.total_nbytes)

            execution.run(codec, workers=_num_workers(prepared), stop=stop, tick=tick)
            tick()
            if not execution.is_done:
                done, total = format_size(execution.counters.done_nbytes), format_size(execution.counters.total_nbytes)
                raise DeadlineError(
                    f"the deadline is reached with {done} of {total} done", "the same command continues"
                )
            staging.keep_only({work.plan.file for work in execution.works} | {work.side.name for work in sides})
            prepared.source.check_unchanged()
            packed = time.monotonic()
            root = write_metadata(prepared, execution.works, sides, staging.content, card_section)
            if card_section is not None:
                started += time.monotonic() - packed  # which would be taken for the speed of packing
        commit = staging.commit_file if prepared.source.is_single_file else staging.commit
        commit(overwrite=options.overwrite or half_committed)
    return _result(prepared, root, time.monotonic() - started, execution, staging)


def _is_half_committed(prepared: Prepared, staging: Staging) -> bool:
    """Whether a single file waits for its rename, and its manifest went first."""
    return (staging.content / prepared.output.name).exists()


def _exists(prepared: Prepared) -> OutputError:
    return OutputError(f"{prepared.output} exists", "choose another -o, or --overwrite replaces it")


def _side_nbytes(prepared: Prepared) -> int:
    return sum(side.size for side in prepared.side_files if side.rule is None)


def _finished_root(prepared: Prepared) -> str | None:
    """The root of the output, if it was made from this source by this recipe; OutputError if it is not whole.

    Headers, small files and sizes are compared; weights are not read.
    """
    try:
        document = json.loads(read_regular(manifest_path(prepared)))
        same_source = document["source"]["fingerprint"] == prepared.source.fingerprint
        recipes = [_decisive(document["recipe"]), _decisive({**prepared.plan.selection, **prepared.plan.recipe_data})]
        if not (same_source and recipes[0] == recipes[1] and describes(prepared, document["files"])):
            return None
        check_whole(manifest_path(prepared))
        return str(document["root"])
    except VerificationError as error:
        raise OutputError(
            f"{prepared.output} is of the same recipe, but damaged: {error}",
            "--overwrite replaces it, or choose another -o",
        ) from None
    except (InputError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _decisive(recipe: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in recipe.items() if key != "reason"}


def _resume(prepared: Prepared, execution: Execution, journal: Journal, staging: Staging) -> None:
    """Go on where an earlier run stopped; a changed selection (`--ignore`, say) redoes only the shards it touches."""
    fingerprint, recipe = prepared.source.fingerprint, prepared.plan.recipe_data
    head, progress = journal.read() if prepared.options.resume else ({}, None)
    if progress is None or not head:
        staging.clear_content()
        journal.start(fingerprint, _decisive(recipe))
        return
    _check_same(prepared, head, staging)
    execution.resume(progress)


def _check_same(prepared: Prepared, head: Mapping[str, Any], staging: Staging) -> None:
    other = "recipe" if head.get("source") == prepared.source.fingerprint else "checkpoint"
    if head and (other == "checkpoint" or head.get("recipe") != _decisive(prepared.plan.recipe_data)):
        raise OutputError(f"{staging.folder} has unfinished work of another {other}", "--no-resume discards it")


def _num_workers(prepared: Prepared) -> int:
    """As many threads as there are cores, but no more than the memory budget holds bands for."""
    band = max((Band(tensor, 0).nbytes for tensor in prepared.plan.tensors if tensor.num_bands), default=1)
    budget = max(prepared.options.max_memory - _BASE_MEMORY, 0)
    return max(1, min(prepared.options.workers or usable_cores(), budget // (band + band // 2)))


def _result(prepared: Prepared, root: str, seconds: float, execution: Execution, staging: Staging) -> Written:
    measured = sqnr_of(execution.works)
    return Written(
        root=root,
        already_complete=False,
        seconds=seconds,
        resumed_nbytes=execution.counters.resumed_nbytes,
        peak_memory=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        sqnr=summarize_sqnr(measured.weights),
        output_sqnr=summarize_sqnr(measured.outputs),
        notes=(*staging.notes, *card_notes(prepared)),
    )
