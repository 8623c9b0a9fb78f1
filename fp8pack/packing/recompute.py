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
from fp8pack.packing.metadata import energies_of, small_digests, tensor_entries
from fp8pack.packing.model_card import CARD_NAME
from fp8pack.packing.options import WriteOptions
from fp8pack.packing.prepare import Prepared, prepare_convert, prepare_pack, prepare_unpack
from fp8pack.packing.target import Nowhere, Target
from fp8pack.packing.workers import Stop
from fp8pack.planning.recipe_file import make_request

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

    Raises:
        InputError: the source is not the one that was packed.
        RecipeError: the recipe needs the calibration file, or is not one of this version.
    """
    prepared = prepare_again(packed, source, calibration)
    works = _run(prepared, packed, tell)
    yield from _tensor_differences(dict(tensor_entries(works)), packed)
    yield from _file_differences(prepared, packed)


def energies(prepared: Prepared, packed: Packed) -> dict[str, tuple[float, float]]:
    """Return the energies of each weight, as packing the source again measures them; the model card shows them."""
    return energies_of(_run(prepared, packed, lambda done, total: None))


def prepare_again(packed: Packed, source: Path, calibration: Path | None) -> Prepared:
    """Return the plan of packing a source by the recipe of a manifest; raises as `recompute` does."""
    prepared = _prepare(packed, source, calibration)
    if prepared.source.fingerprint != packed.document["source"]["fingerprint"]:
        raise InputError(f"{source} is not what {packed.checkpoint} was packed from", "choose its source")
    return prepared


def execution_of(prepared: Prepared, packed: Packed, target: Target) -> Execution:
    """Return the work of a plan that goes elsewhere than a pack does, and is not continued."""
    return Execution(
        *(prepared.plan, prepared.source, ()),
        folder=packed.manifest.parent,
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


def _run(prepared: Prepared, packed: Packed, tell: Callable[[int, int], None]) -> tuple[ShardWork, ...]:
    execution = execution_of(prepared, packed, Nowhere())
    run_execution(execution, prepared, tell)
    return execution.works


def _prepare(packed: Packed, source: Path, calibration: Path | None) -> Prepared:
    recipe = packed.document["recipe"]
    options = WriteOptions(output=packed.checkpoint, overwrite=True)
    if "unpack" in recipe:
        return prepare_unpack(source, str(recipe["unpack"]), options)
    if "calibration" in recipe and calibration is None:
        raise RecipeError("the scales of activations are of a calibration file", "add --calibration FILE")
    request = make_request(packed.manifest, calibration=calibration)
    contents = read_contents(open_checkpoint(source))
    prepare = prepare_convert if contents.storage is not None else prepare_pack
    return prepare(source, request, options)


def _tensor_differences(again: Mapping[str, Any], packed: Packed) -> Iterator[Difference]:
    """By what is recorded of a tensor, but for the shard that it lies in."""
    stated = packed.document["tensors"]
    for name in sorted(again.keys() | stated.keys()):
        entries = [dict(entries.get(name, {})) for entries in (stated, again)]
        file = str(entries[0].pop("file", "")) or packed.manifest.name
        entries[1].pop("file", None)
        if not entries[0] or not entries[1]:
            yield Difference(file, f"it is {'not ' if not entries[1] else ''}what the source has", name)
        elif entries[0] != entries[1]:
            keys = [key for key in entries[0].keys() | entries[1].keys() if entries[0].get(key) != entries[1].get(key)]
            yield Difference(file, f"{_OTHER}, by {', '.join(sorted(keys))}", name)


def _file_differences(prepared: Prepared, packed: Packed) -> Iterator[Difference]:
    """By the digests of small files, but for the index, which follows the size of shards, and the model card.

    A file that `--copy` brought along is compared with the source's own.
    """
    stated = {name: entry["digest"] for name, entry in packed.document["files"].items() if "digest" in entry}
    again = small_digests(prepared)
    for name in sorted(again.keys() | stated.keys()):
        if name == CARD_NAME or name.endswith(".index.json"):
            continue
        digest = again.get(name) or digest_of_file(prepared.source.directory / name)
        if stated.get(name) != digest:
            yield Difference(name, _OTHER)
