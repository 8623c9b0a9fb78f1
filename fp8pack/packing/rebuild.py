"""A damaged manifest, made again from the source: kept only if its root is the one that was packed."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from fp8pack.checkpoint.manifest import write_manifest
from fp8pack.checkpoint.shard_writer import sync_directory, writing
from fp8pack.checkpoint.source import ShardReader
from fp8pack.checkpoint.whole import digest_of_file
from fp8pack.errors import InputError, RecipeError, VerificationError
from fp8pack.packing.metadata import head_of, shard_entries, small_entries, tensor_entries
from fp8pack.packing.model_card import CARD_NAME
from fp8pack.packing.prepare import Prepared
from fp8pack.packing.recompute import Packed, prepare_anew, run_nowhere
from fp8pack.regular_files import read_regular

_SECTION = re.compile(rb'"(\w+)": \{')
_ROOT = re.compile(rb'"root": "(blake3:[0-9a-f]{64})"')


def rebuild(  # noqa: PLR0913
    checkpoint: Path,
    place: Path,
    source: Path,
    tell: Callable[[int, int], None],
    *,
    calibration: Path | None,
    recipe: Path | None,
    root: str | None,
) -> None:
    """Write a manifest again, whose lines may be damaged, or which is missing.

    recipe: in place of the one in it. root: in place of the one in it.

    Raises:
        RecipeError: neither the manifest nor the caller says by which recipe, or which root is right.
        VerificationError: what is rebuilt has another root; nothing is written.
    """
    sections, stated_root = _salvage(read_regular(place) if place.exists() else b"")
    stated = sections.get("recipe", {}) if recipe is None else _salvage(read_regular(recipe))[0].get("recipe", {})
    wanted = root or stated_root
    if wanted is None:
        raise RecipeError(f"{place.name} does not say which root is right", "add --root DIGEST")
    if not stated and recipe is None:
        raise RecipeError(f"{place.name} does not say how it was packed", "add --recipe FILE")
    document = {"recipe": stated, "tensors": dict(_located(place.parent))}
    prepared = prepare_anew(Packed(checkpoint, place, document), source, calibration, recipe)
    works = run_nowhere(prepared, tell)
    files = shard_entries(works) | _small_entries(prepared, sections.get("files", {}), place.parent)
    head = head_of(prepared, files)
    temporary = place.with_name(f".{place.name}.fp8pack-partial")
    try:
        for candidate in (stated, head["recipe"]):
            if write_manifest(temporary, {**head, "recipe": candidate}, tensor_entries(works)) == wanted:
                with writing(place):
                    temporary.replace(place)
                sync_directory(place.parent)
                return
    finally:
        temporary.unlink(missing_ok=True)
    raise VerificationError(
        f"what is rebuilt of {place.name} has another root than {wanted}: of another source, recipe or model card",
        "add --recipe FILE or --root DIGEST, or pack the source again",
    )


def _salvage(raw: bytes) -> tuple[dict[str, dict[str, Any]], str | None]:
    """What the lines of a manifest say, as far as each can be read, and its root."""
    sections: dict[str, dict[str, Any]] = {}
    entries: dict[str, Any] = {}
    for line in raw.splitlines():
        if match := _SECTION.fullmatch(line):
            entries = sections.setdefault(match[1].decode(), {})
            continue
        try:
            entries |= json.loads(b"{" + line.strip().removesuffix(b",") + b"}")
        except (ValueError, RecursionError, TypeError):
            continue
    found = _ROOT.search(raw)
    return sections, found[1].decode() if found else None


def _located(folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """The file of each tensor, by the headers that can be read."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with closing(ShardReader(path)) as reader:
                names = [spec.name for spec in reader.header().tensors]
        except InputError:
            continue
        yield from ((name, {"file": path.name}) for name in names)


def _small_entries(prepared: Prepared, stated: Mapping[str, Any], folder: Path) -> dict[str, dict[str, Any]]:
    """The entries of files that are no shards: what packing gives; of the rest, as stated, or as they lie there."""
    found = small_entries(prepared)
    if prepared.source.is_single_file:
        return found
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name in found:
            continue
        entry = stated.get(name)
        if isinstance(entry, dict) and "digest" in entry:
            found[name] = entry
        elif name == CARD_NAME:
            found[name] = {"size": path.stat().st_size, "digest": digest_of_file(path)}
    return found
