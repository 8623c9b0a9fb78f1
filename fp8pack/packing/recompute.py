"""What packing a source again would give: every digest of the manifest, without a byte written."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fp8pack.checkpoint.journal import NoRecord
from fp8pack.checkpoint.quantized import read_contents
from fp8pack.checkpoint.source import open_checkpoint
from fp8pack.checkpoint.whole import Difference, digest_of_file
from fp8pack.errors import InputError, RecipeError
from fp8pack.machine import usable_cores
from fp8pack.packing.codecs import make_codec
from fp8pack.packing.execute import Execution, ShardWork
from fp8pack.packing.metadata import shard_entries, small_entries, tensor_entries
from fp8pack.packing.model_card import CARD_NAME
from fp8pack.packing.options import WriteOptions
from fp8pack.packing.prepare import Prepared, prepare_convert, prepare_pack, prepare_unpack
from fp8pack.packing.sqnr import Measured, sqnr_of
from fp8pack.packing.stated_calibration import stated_calibration
from fp8pack.packing.target import Nowhere, Target
from fp8pack.packing.workers import Stop
from fp8pack.planning.recipe_file import keywords_of, make_request

_OTHER = "it is not what packing the source gives"


@dataclass(frozen=True, slots=True)
class Packed:
    """A packed checkpoint, where its manifest is, and what that says, as parsed JSON."""

    checkpoint: Path
    manifest: Path
    document: Mapping[str, Any]


def recompute(
    packed: Packed, source: Path, calibration: Path | None, tell: Callable[[int, int], None]
) -> Iterator[Difference]:
    """Pack a source again by the recipe of a manifest, and yield what the manifest has otherwise.

    calibration: the file that scales of activations are computed from; without it they are taken from the manifest.

    Raises:
        InputError: the source, or the calibration, is not the one that was used.
        RecipeError: the recipe is not one of this version, or needs a calibration.
    """
    prepared = prepare_again(packed, source, calibration)
    works = run_nowhere(prepared, tell)
    yield from _tensor_differences(dict(tensor_entries(works)), packed)
    yield from _file_differences(prepared, works, packed)


def sqnr_again(prepared: Prepared) -> Measured:
    """Return the SQNR of weights and outputs, as packing the source again measures it; the model card shows it."""
    return sqnr_of(run_nowhere(prepared, lambda done, total: None))


def prepare_again(packed: Packed, source: Path, calibration: Path | None) -> Prepared:
    """Return the plan of packing a source by the recipe of a manifest; raises as `recompute` does."""
    prepared = prepare_anew(packed, source, calibration)
    if prepared.source.fingerprint != packed.document["source"]["fingerprint"]:
        raise InputError(f"{source} is not what {packed.checkpoint} was packed from", "choose its source")
    stated, now = (recipe.get("calibration") for recipe in (packed.document["recipe"], prepared.plan.recipe_data))
    if "rounding" in packed.document["recipe"] and stated != now:
        raise InputError(f"{calibration} is not the calibration that {packed.checkpoint} was rounded with")
    return prepared


def prepare_anew(packed: Packed, source: Path, calibration: Path | None, recipe: Path | None = None) -> Prepared:
    """Return the plan of packing any source by a recipe, that of the manifest if None, cut into the shards it has."""
    options = WriteOptions(output=packed.checkpoint, overwrite=True)
    prepared = _prepare(packed, source, calibration, recipe, options)
    limit = _shard_limit(prepared, packed)
    if limit is None:
        return prepared
    options = WriteOptions(output=packed.checkpoint, overwrite=True, max_shard_size=limit)
    return _prepare(packed, source, calibration, recipe, options)


def execution_of(prepared: Prepared, target: Target) -> Execution:
    """Return the work of a plan that goes elsewhere than a pack does, and is not continued."""
    return Execution(
        *(prepared.plan, prepared.source, ()),
        folder=prepared.output,
        journal=NoRecord(),
        target=target,
        checkpoint_nbytes=prepared.options.sizes.checkpoint,
    )


def run_execution(execution: Execution, prepared: Prepared, tell: Callable[[int, int], None]) -> None:
    """Do the work, on all cores; raises as a pack does."""

    def tick() -> None:
        tell(execution.counters.done_nbytes, execution.counters.total_nbytes)

    codec = make_codec(prepared.options.device, prepared.options.sizes.strip)
    execution.run(codec, workers=usable_cores(), stop=Stop(), tick=tick)


def run_nowhere(prepared: Prepared, tell: Callable[[int, int], None]) -> tuple[ShardWork, ...]:
    """Do the work of a plan for its digests alone."""
    execution = execution_of(prepared, Nowhere())
    run_execution(execution, prepared, tell)
    return execution.works


def _prepare(
    packed: Packed, source: Path, calibration: Path | None, recipe: Path | None, options: WriteOptions
) -> Prepared:
    stated = packed.document["recipe"]
    if recipe is None and "unpack" in stated:
        return prepare_unpack(source, str(stated["unpack"]), options)
    request = make_request(recipe or keywords_of(stated), calibration=calibration)
    contents = read_contents(open_checkpoint(source))
    prepare = prepare_convert if contents.storage is not None else prepare_pack
    takes_stated = recipe is None and "calibration" in stated and calibration is None
    if takes_stated and "rounding" in stated:
        raise RecipeError(
            f"{packed.checkpoint} was rounded with the second moments of a calibration", "add --calibration FILE"
        )
    return prepare(source, request, options, stated_calibration(packed.document) if takes_stated else None)


def _shard_limit(prepared: Prepared, packed: Packed) -> int | None:
    """The size that cuts a plan as a checkpoint was cut, None if it was not.

    It is that of the largest shard with more than one tensor: with it, what went into one shard still does, and what
    did not fit still does not.
    """
    file_of = {entry.get("tensor", name): entry["file"] for name, entry in packed.document["tensors"].items()}
    planned = {stored.name: shard.file for shard in prepared.plan.shards for stored in shard.tensors}
    if prepared.source.is_single_file or all(file_of.get(name, file) == file for name, file in planned.items()):
        return None
    members: dict[str, list[int]] = {}
    for tensor in prepared.plan.tensors:
        small = sum(constant.stored.nbytes for constant in tensor.constants)
        nbytes = tensor.data.nbytes + small + (tensor.packing.scale.nbytes if tensor.packing else 0)
        members.setdefault(file_of.get(tensor.data.name, ""), []).append(nbytes)
    return max((sum(sizes) for sizes in members.values() if len(sizes) > 1), default=1)


def _tensor_differences(again: Mapping[str, Any], packed: Packed) -> Iterator[Difference]:
    """By what is recorded of a tensor."""
    stated = packed.document["tensors"]
    for name in sorted(again.keys() | stated.keys()):
        entries = [entries.get(name, {}) for entries in (stated, again)]
        file = str(entries[0].get("file", packed.manifest.name))
        if not entries[0] or not entries[1]:
            yield Difference(file, f"it is {'not ' if not entries[1] else ''}what the source has", name)
        elif entries[0] != entries[1]:
            keys = [key for key in entries[0].keys() | entries[1].keys() if entries[0].get(key) != entries[1].get(key)]
            yield Difference(file, f"{_OTHER}, by {', '.join(sorted(keys))}", name)


def _file_differences(prepared: Prepared, works: tuple[ShardWork, ...], packed: Packed) -> Iterator[Difference]:
    """By headers and the digests of small files, but for the model card.

    A file that `--copy` brought along is compared with the source's own.
    """
    stated = packed.document["files"]
    again = shard_entries(works) | small_entries(prepared)
    for name in sorted((again.keys() | stated.keys()) - {CARD_NAME}):
        entry = again.get(name) or {"digest": digest_of_file(prepared.source.directory / name)}
        if any(stated.get(name, {}).get(key) != value for key, value in entry.items()):
            yield Difference(name, _OTHER)
