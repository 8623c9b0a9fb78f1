"""`verify`: whether a checkpoint is whole, byte for byte as it was packed."""

import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path

import numpy as np

from fp8pack.checkpoint.digests import expected_digests
from fp8pack.checkpoint.manifest import MANIFEST_NAME
from fp8pack.checkpoint.manifest_schema import Entry, Manifest, PackedEntry, find_manifest
from fp8pack.checkpoint.quantized import read_contents
from fp8pack.checkpoint.sha256sums import sum_files
from fp8pack.checkpoint.source import ShardReader, find_checkpoint, open_checkpoint
from fp8pack.checkpoint.whole import CHANGED, Difference, check_files, other_files
from fp8pack.errors import InputError, RecipeError, VerificationError
from fp8pack.inputs import parse_path, parse_switch
from fp8pack.modelfacts.spec import TensorSpec
from fp8pack.numerics.formats import FORMATS, Float8Format
from fp8pack.packing.rebuild import rebuild
from fp8pack.packing.recompute import Packed, recompute
from fp8pack.packing.repair import repair as repair_checkpoint
from fp8pack.reading.scan import (
    EXPONENTS,
    FLOATS,
    OnProgress,
    Scan,
    Watch,
    pieces_of,
    problem_of_payload,
    watch_of_scales,
)
from fp8pack.reading.verification import Verification
from fp8pack.regular_files import read_regular

_FORMATS = {format.name: format for format in FORMATS}


def verify(  # noqa: PLR0913
    checkpoint: str | Path,
    *,
    quick: bool = False,
    sample: str | None = None,
    strict: bool = False,
    sha256: bool = False,
    against: str | Path | None = None,
    calibration: str | Path | None = None,
    repair: bool = False,
    recipe: str | Path | None = None,
    root: str | None = None,
    on_progress: OnProgress | None = None,
) -> Verification:
    """Compare every byte of a checkpoint with its manifest, and return every difference.

    checkpoint: what `pack`, `convert` or `unpack` wrote; of what another tool made, headers, scales and NaN bytes are
    checked. quick: sizes, headers and small files; no weight is read. sample: such as "1/20": the first of 20 parts of
    the tensors, so that 20 runs read all. strict: files that the manifest does not name are differences. sha256: write
    SHA256SUMS, or compare with it if it is there. against: the source: pack it again, without writing, and compare
    every scale and byte by its digest. calibration: the file of `fp8pack.calibrate`; without it scales of activations
    are taken from the manifest. repair: write what differs again, from `against`, in place; recipe, root: what a
    damaged manifest cannot say of itself. on_progress: is told (bytes done, bytes in all).

    Raises:
        InputError: there is no such checkpoint, or `against` is not what it was packed from.
        RecipeError: an option is out of range.
        VerificationError: the manifest that was rebuilt has another root.
        SpaceError: SHA256SUMS cannot be written.
    """
    started, path = time.monotonic(), find_checkpoint(parse_path("checkpoint", checkpoint))
    part, is_quick = _parse_part(sample), parse_switch("quick", quick)
    if part and is_quick:
        raise RecipeError("quick and sample exclude each other", "leave out --quick, or leave out --sample")
    repairs = parse_switch("repair", repair)
    if repairs and against is None:
        raise RecipeError("a repair needs the source", "add --against SOURCE")
    if (recipe is not None or root is not None) and not repairs:
        raise RecipeError("a recipe and a root are for the repair of a manifest", "add --repair")
    manifest_path = find_manifest(path)
    if manifest_path is None and recipe is not None:
        manifest_path = path / MANIFEST_NAME if path.is_dir() else path.with_suffix(f".{MANIFEST_NAME}")
    tell = on_progress or (lambda done, total: None)
    found = _Found()
    if manifest_path is None:
        _verify_foreign(path, found, tell, part=part, is_quick=is_quick)
    else:
        _verify_packed(manifest_path, found, tell, part=part, is_quick=is_quick)
        if path.is_dir() and found.manifest is not None:
            found.others = other_files(path, found.manifest.files, manifest_path.name)
    if against is not None:
        source = _Source(
            parse_path("against", against),
            None if calibration is None else parse_path("calibration", calibration),
            None if recipe is None else parse_path("recipe", recipe),
            None if root is None else _parse_root(root),
        )
        found = _against(path, manifest_path, found, source, tell, repairs=repairs)
    if parse_switch("strict", strict):
        found.differences += [Difference(name, "it is not in fp8pack.json") for name in found.others]
    if parse_switch("sha256", sha256):
        found.differences += sum_files(path, may_write=not found.differences)
    return Verification(
        checkpoint=path,
        root=found.manifest.root if found.manifest else None,
        num_files=found.num_files,
        num_tensors=found.num_tensors,
        all_tensors=found.all_tensors,
        nbytes=found.nbytes,
        differences=tuple(found.differences),
        other_files=tuple(found.others),
        unknown=tuple(found.unknown),
        seconds=time.monotonic() - started,
        repaired=tuple(found.repaired),
    )


@dataclass(slots=True)
class _Found:
    manifest: Manifest | None = None
    differences: list[Difference] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    repaired: list[Difference] = field(default_factory=list)
    num_files: int = 0
    num_tensors: int = 0
    all_tensors: int = 0
    nbytes: int = 0


@dataclass(frozen=True, slots=True)
class _Source:
    """What a checkpoint is compared with, and what it may need beside it."""

    path: Path
    calibration: Path | None
    recipe: Path | None
    root: str | None


def _against(
    path: Path, place: Path | None, found: _Found, source: _Source, tell: OnProgress, *, repairs: bool
) -> _Found:
    """Compare with what packing the source gives, after a repair if one is asked for and needed."""
    if place is None or (found.manifest is None and not repairs):
        raise InputError(f"{path} has no fp8pack.json that says how it was packed", "leave out --against")
    before, others = found.differences, [name for name in found.others if not name.endswith(".fp8pack-partial")]
    if repairs and any(difference.file == place.name for difference in before):
        rebuild(
            *(path, place, source.path, tell),
            calibration=source.calibration,
            recipe=source.recipe,
            root=source.root,
        )
        found = _Found(others=others)
        _verify_packed(place, found, tell, part=None, is_quick=False)
    manifest = found.manifest
    if manifest is None:
        raise VerificationError(f"{place.name} cannot be read", "copy it again from where it was packed")
    packed = Packed(path, place, json.loads(read_regular(place)))
    if repairs and found.differences:
        before += [difference for difference in found.differences if difference not in before]
        repair_checkpoint(packed, manifest, found.differences, source.path, source.calibration, tell)
        found = _Found(others=others)
        _verify_packed(place, found, tell, part=None, is_quick=False)
    if repairs:
        found.repaired = [difference for difference in before if difference not in found.differences]
    found.differences += recompute(packed, source.path, source.calibration, tell)
    found.unknown.append("README.md was not recomputed: it says where the source lies")
    if "calibration" in packed.document["recipe"] and source.calibration is None:
        found.unknown.append("scales of activations were not recomputed: add --calibration FILE")
    return found


def _parse_root(text: object) -> str:
    match = re.fullmatch(r"(?:blake3:)?([0-9a-f]{64})", str(text))
    if match is None:
        raise RecipeError(f"root {text!r} is not a digest", "write blake3: and 64 hexadecimal digits")
    return f"blake3:{match[1]}"


def _parse_part(text: str | None) -> tuple[int, int] | None:
    match = re.fullmatch(r"([1-9]\d{0,5})/([1-9]\d{0,5})", str(text)) if text is not None else None
    if text is not None and (match is None or int(match[1]) > int(match[2])):
        raise RecipeError(f"sample {text!r} is no part of a whole", "write 1/20, 2/20, … for each of 20 parts")
    return (int(match[1]), int(match[2])) if match else None


def _verify_packed(
    path: Path, found: _Found, tell: OnProgress, *, part: tuple[int, int] | None, is_quick: bool
) -> None:
    files = check_files(path)
    found.manifest, found.differences = files.manifest, files.differences
    if files.manifest is None:
        found.unknown.append(f"{path.name} cannot be read, so nothing else was compared")
        return
    if any(difference.file == path.name for difference in found.differences):
        found.unknown.append(f"{path.name} is damaged, so what it says of other files may be wrong")
    all_entries, readable = files.manifest.tensors, files.headers.keys()
    entries = {name: entry for name, entry in all_entries.items() if entry.file in readable}
    specs = {spec.name: spec for header in files.headers.values() for spec in header.tensors}
    expected = expected_digests(entries, specs)
    found.num_files, found.all_tensors = len(files.manifest.files) + 1, len(expected)
    for file in sorted({entry.file for entry in all_entries.values()} - readable):
        found.unknown.append(f"the tensors of {file} were not compared")
    watches: dict[str, Watch] = {}
    for name, entry in entries.items():
        if isinstance(entry, PackedEntry):
            watches[entry.tensor or name] = partial(problem_of_payload, _FORMATS[entry.format])
            watches[entry.scale_inv.tensor] = watch_of_scales(entry.scale_inv.dtype)
    chosen = _chosen(expected, found, part, is_quick=is_quick)
    scan = Scan(files.directory, watches)
    found.nbytes = scan.run([(expected[name].spec, expected[name].pieces) for name in chosen], tell)
    for name in chosen:
        each = expected[name]
        try:
            each.check([digest for piece in each.pieces for digest in scan.digests.get((name, piece.begin), ())])
        except VerificationError:
            found.differences.append(Difference(each.spec.file, CHANGED, name))
    found.differences += scan.problems
    if not is_quick:
        found.differences += _activation_differences(files.directory, entries.values(), specs)


def _verify_foreign(
    path: Path, found: _Found, tell: OnProgress, *, part: tuple[int, int] | None, is_quick: bool
) -> None:
    """Headers, index, and the pairing of weights and scales; then the bytes of those."""
    found.unknown.append("there is no fp8pack.json, so whether the bytes are those that were written is not known")
    try:
        source = open_checkpoint(path)
        contents = read_contents(source)
    except InputError as error:
        found.differences.append(Difference(path.name, str(error)))
        return
    found.num_files = len(source.files)
    specs: dict[str, TensorSpec] = {}
    watches: dict[str, Watch] = {}
    stored = {(spec.file, spec.begin): spec for spec in source.specs}
    for spec in contents.tensors:
        if (quantized := contents.quantized.get(spec.name)) is None:
            continue
        if isinstance(quantized.format, Float8Format):
            payload = stored[spec.file, spec.begin]
            specs[payload.name], watches[payload.name] = payload, partial(problem_of_payload, quantized.format)
        if quantized.scale is not None and quantized.scale.dtype in (*FLOATS, *EXPONENTS):
            scale = stored.get((quantized.scale.file, quantized.scale.begin), quantized.scale)
            specs[scale.name], watches[scale.name] = scale, watch_of_scales(scale.dtype)
    found.all_tensors = len(specs)
    chosen = _chosen(specs, found, part, is_quick=is_quick)
    scan = Scan(source.directory, watches)
    found.nbytes = scan.run([(specs[name], tuple(pieces_of(specs[name].nbytes))) for name in chosen], tell)
    found.differences += scan.problems


def _chosen(tensors: Mapping[str, object], found: _Found, part: tuple[int, int] | None, *, is_quick: bool) -> list[str]:
    """The tensors that are read."""
    names = [] if is_quick else sorted(tensors)
    if is_quick:
        found.unknown.append("weights were not read")
    elif part is not None:
        names = names[part[0] - 1 :: part[1]]
        found.unknown.append(f"part {part[0]} of {part[1]} was read: {len(names)} of {len(tensors)} tensors")
    found.num_tensors = len(names)
    return names


def _activation_differences(
    directory: Path, entries: Iterable[Entry], specs: Mapping[str, TensorSpec]
) -> Iterator[Difference]:
    """The stored scales of activations against the values in the manifest."""
    for scale in (scale for entry in entries for scale in entry.activation_scales):
        spec, stored = specs[scale.tensor], np.empty(prod(scale.shape), np.float32)
        with closing(ShardReader(directory / spec.file)) as reader:
            reader.readinto(stored.data.cast("B"), spec.begin)
        if not (stored == np.float32(scale.value)).all():
            yield Difference(spec.file, f"the scale is not {scale.value:g}, as fp8pack.json has it", spec.name)
