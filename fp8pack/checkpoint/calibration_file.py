"""`calibration.safetensors`: a calibration as a safetensors file that any reader opens. docs/format.md, "Calibration".

For each site, under its first point: `<point>.bins` U16, `<point>.counts` I64, `<point>.channel_amax` BF16 [K],
`<point>.channel_squares` F64 [K], `<point>.prompt_amax` BF16 [P]; `all_experts/<point>…` for the set of all experts.
Schema 2 adds `<point>.second_moments` F64 [B, S * (S + 1) / 2] to inputs, for blocks of S channels.
The rest is JSON in the metadata, under the key `fp8pack_calibration`.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fp8pack.checkpoint.header import build_header
from fp8pack.checkpoint.shard_writer import ShardWriter, sync_directory, writing
from fp8pack.checkpoint.source import ShardReader
from fp8pack.errors import InputError, SpaceError
from fp8pack.modelfacts.spec import DTYPE_BITS, Stored, TensorSpec
from fp8pack.numerics.second_moments import BLOCK, diagonal_of, triangles_shape
from fp8pack.planning.calibration import INFINITY, NUM_MAGNITUDES, Calibration, Moments, Site
from fp8pack.regular_files import FileVersion

SCHEMA_VERSIONS = (1, 2)  # the second is written where there are second moments
METADATA_KEY = "fp8pack_calibration"
_ALL_EXPERTS = "all_experts/"
_MOMENTS = ".second_moments"
_MAX_CHANNELS = 1 << 24
_PIECE = 16 << 20  # what is digested at a time
_DTYPES: dict[str, tuple[str, np.dtype[Any]]] = {
    "bins": ("U16", np.dtype("<u2")),
    "counts": ("I64", np.dtype("<i8")),
    "channel_amax": ("BF16", np.dtype("<u2")),
    "channel_squares": ("F64", np.dtype("<f8")),
    "prompt_amax": ("BF16", np.dtype("<u2")),
}


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SiteEntry(_Entry):
    """A site: the names it goes by, how many tokens passed it, and the channels of a block of its second moments."""

    points: Annotated[tuple[str, ...], Field(min_length=1)]
    tokens: Annotated[int, Field(ge=0)]
    heads: Annotated[int, Field(ge=1)] = 1
    block: Annotated[int, Field(ge=0)] = 0


class CalibrationEntry(_Entry):
    """The metadata of a calibration file."""

    schema_: Annotated[int, Field(alias="schema")]
    fingerprint: str
    prompts: tuple[str, ...]
    num_tokens: Annotated[int, Field(ge=0)] = 0
    options: dict[str, Any]
    growth_last_quarter: float | None
    sites: tuple[SiteEntry, ...]
    all_experts: tuple[SiteEntry, ...] = ()


def write_calibration(path: Path, calibration: Calibration) -> None:
    """Write a calibration file, all or nothing: a killed run leaves the old one.

    The bytes follow from the calibration alone. Raises SpaceError when the place is not writable.
    """
    if not path.parent.is_dir():
        raise SpaceError(f"{path.parent} is not a directory", "make it first")
    arrays = sorted(_arrays(calibration), key=lambda item: _place(item[0]))
    begins, size = [], 0
    for stored, _ in arrays:
        begins.append(size)
        size += stored.nbytes
    metadata = {METADATA_KEY: json.dumps(_metadata(calibration), ensure_ascii=False)}
    header = build_header([stored for stored, _ in arrays], begins, metadata)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with closing(ShardWriter(temporary, create=True)) as writer:
            writer.start(header, len(header) + size)
            for (_, load), begin in zip(arrays, begins, strict=True):
                writer.write(memoryview(load().tobytes()), len(header) + begin)
            writer.sync()
        with writing(path):
            temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink()
    sync_directory(path.parent)


def read_calibration(path: Path) -> Calibration:
    """Read and check a calibration file; second moments are read and checked when they are asked for.

    Raises:
        InputError: it is no calibration of fp8pack, of a schema that this version does not know, or malformed.
    """
    if not path.exists():
        raise InputError(f"{path} does not exist")
    with closing(ShardReader(path)) as reader:
        header, version = reader.header(), reader.version
        entry = _parse_metadata(header.metadata, path.name)
        specs = {spec.name: spec for spec in header.tensors}
        _check_tensors(entry, specs, path.name)  # before a byte of them is read: sizes are bounded from here on
        begin = min((spec.begin for spec in header.tensors if not spec.name.endswith(_MOMENTS)), default=reader.size)
        digest, data = blake3(), bytearray(reader.size - begin)
        for offset in range(0, begin, _PIECE):
            piece = bytearray(min(_PIECE, begin - offset))
            reader.readinto(memoryview(piece), offset)
            digest.update(piece)
        reader.readinto(memoryview(data), begin)
        digest.update(data)

    def site(prefix: str, found: SiteEntry) -> Site:
        name = f"{prefix}{found.points[0]}"
        arrays: list[NDArray[Any]] = []
        for kind, (_, dtype) in _DTYPES.items():
            spec = specs[f"{name}.{kind}"]
            arrays.append(np.frombuffer(data, dtype, spec.shape[0], spec.begin - begin))
        read = Site(found.points, found.tokens, arrays[0], arrays[1], arrays[2], arrays[3], arrays[4], found.heads)
        if not _is_sound(read):
            raise _contradiction(path.name, name)
        if not found.block:
            return read
        load = partial(_read_moments, path, version, specs[f"{name}{_MOMENTS}"], read, found.block)
        return replace(read, moments=Moments(found.block, load))

    return Calibration(
        entry.fingerprint,
        entry.prompts,
        entry.options,
        tuple(site("", found) for found in entry.sites),
        tuple(site(_ALL_EXPERTS, found) for found in entry.all_experts),
        f"blake3:{digest.hexdigest()}",
        entry.num_tokens,
    )


def _read_moments(path: Path, version: FileVersion, spec: TensorSpec, site: Site, block: int) -> NDArray[np.float64]:
    """The triangles of a site; InputError if they contradict the sums of squares, which are their diagonal."""
    triangles = np.empty(spec.shape, np.float64)
    with closing(ShardReader(path, version)) as reader:
        reader.readinto(triangles.data.cast("B"), spec.begin)
    diagonal = diagonal_of(triangles, site.channel_squares.size, block)
    if not np.isfinite(triangles).all() or not np.allclose(diagonal, site.channel_squares, rtol=1e-9, atol=0):
        raise _contradiction(path.name, site.points[0])
    return triangles


def _contradiction(file: str, site: str) -> InputError:
    return InputError(f"{file}: the statistics of {site[:200]!r} contradict each other", "calibrate again")


def is_calibration(path: Path) -> bool:
    """Say whether a file is a calibration; InputError if it is no well-formed safetensors file."""
    with closing(ShardReader(path)) as reader:
        return METADATA_KEY in reader.header().metadata


def _check_tensors(entry: CalibrationEntry, specs: Mapping[str, TensorSpec], file: str) -> None:
    """Each site has its tensors, of sizes that can be, and there are no others."""
    expected = {f"{prefix}{site.points[0]}.{kind}" for prefix, site in _sites(entry) for kind in _DTYPES}
    expected |= {f"{prefix}{site.points[0]}{_MOMENTS}" for prefix, site in _sites(entry) if site.block}
    for name in sorted(expected.symmetric_difference(specs)):
        problem = "is missing" if name in expected else "belongs to no site"
        raise InputError(f"{file}: tensor {name[:200]!r} {problem}")
    for prefix, site in _sites(entry):
        shapes = []
        for kind, (dtype, _) in _DTYPES.items():
            spec = specs[f"{prefix}{site.points[0]}.{kind}"]
            if spec.dtype != dtype or len(spec.shape) != 1:
                raise InputError(f"{file}: tensor {spec.name[:200]!r} is not one-dimensional {dtype}")
            shapes.append(spec.shape[0])
        bins, counts, amax, squares, prompts = shapes
        matches = bins == counts and bins <= NUM_MAGNITUDES and amax == squares and amax <= _MAX_CHANNELS
        if site.block:
            moments = specs[f"{prefix}{site.points[0]}{_MOMENTS}"]
            matches &= site.block in (min(BLOCK, amax), amax) and moments.dtype == "F64"
            matches &= moments.shape == triangles_shape(amax, site.block)
        if not matches:
            raise InputError(f"{file}: the tensors of {site.points[0][:200]!r} have shapes that do not match")
        if prompts != len(entry.prompts):
            raise InputError(f"{file}: {site.points[0][:200]!r} has {prompts} prompts, not {len(entry.prompts)}")
    for sites in (entry.sites, entry.all_experts):
        points = [point for site in sites for point in site.points]
        if len(set(points)) != len(points) or len(set(entry.prompts)) != len(entry.prompts):
            raise InputError(f"{file}: a point or a prompt appears twice")


def _sites(entry: CalibrationEntry) -> Iterator[tuple[str, SiteEntry]]:
    yield from (("", site) for site in entry.sites)
    yield from ((_ALL_EXPERTS, site) for site in entry.all_experts)


def _is_sound(site: Site) -> bool:
    """Whether the numbers of a site agree with each other."""
    largest = int(site.bins[-1]) if site.bins.size else 0
    return (
        bool((np.diff(site.bins.astype(np.int64)) > 0).all() and (site.counts > 0).all())
        and site.channel_amax.size > 0
        and site.channel_amax.size % site.heads == 0
        and sum(site.counts.tolist()) == site.tokens * site.channel_amax.size
        and largest == int(site.channel_amax.max())
        and largest == int(site.prompt_amax.max(initial=0))
        and largest < INFINITY
        and bool((np.isfinite(site.channel_squares) & (site.channel_squares >= 0)).all())
    )


def _place(stored: Stored) -> tuple[bool, int]:
    """The key that sorts tensors: second moments first, then by the size of an element, so that each lies aligned."""
    return not stored.name.endswith(_MOMENTS), -DTYPE_BITS[stored.dtype]


def _arrays(calibration: Calibration) -> Iterator[tuple[Stored, Callable[[], NDArray[Any]]]]:
    """Every tensor, and what returns it."""
    for prefix, sites in (("", calibration.sites), (_ALL_EXPERTS, calibration.all_experts)):
        for site in sites:
            name = f"{prefix}{site.points[0]}"
            values: list[NDArray[Any]] = [site.bins, site.counts, site.channel_amax, site.channel_squares]
            values.append(site.prompt_amax)
            for (kind, (stored, dtype)), array in zip(_DTYPES.items(), values, strict=True):
                yield Stored(f"{name}.{kind}", stored, array.shape), partial(array.astype, dtype, copy=False)
            if site.moments is not None:
                shape = triangles_shape(site.channel_amax.size, site.moments.block)
                yield Stored(f"{name}{_MOMENTS}", "F64", shape), site.moments.load


def _metadata(calibration: Calibration) -> dict[str, Any]:
    growth = calibration.growth
    document: dict[str, Any] = {
        "schema": SCHEMA_VERSIONS[-1] if any(site.moments for site in calibration.sites) else SCHEMA_VERSIONS[0],
        "fingerprint": calibration.fingerprint,
        "prompts": list(calibration.prompts),
        "num_tokens": calibration.num_tokens,
        "options": dict(calibration.options),
        "growth_last_quarter": growth if math.isfinite(growth) else None,
        "sites": [_entry(site) for site in calibration.sites],
    }
    if calibration.all_experts:
        document["all_experts"] = [_entry(site) for site in calibration.all_experts]
    return document


def _entry(site: Site) -> dict[str, Any]:
    heads = {"heads": site.heads} if site.heads > 1 else {}
    block = {"block": site.moments.block} if site.moments else {}
    return {"points": list(site.points), "tokens": site.tokens, **heads, **block}


def _parse_metadata(metadata: Mapping[str, str], file: str) -> CalibrationEntry:
    try:
        document = json.loads(metadata[METADATA_KEY])
        schema = document["schema"]
        json.dumps(document, ensure_ascii=False).encode()  # half of a surrogate pair could not be written again
    except (KeyError, ValueError, TypeError, RecursionError):
        raise InputError(
            f"{file} is not a calibration file of fp8pack", "`fp8pack calibrate MODEL` writes one"
        ) from None
    if type(schema) is not int or schema not in SCHEMA_VERSIONS:
        raise InputError(
            f"{file} has schema {str(schema)[:40]!r}, this version reads {SCHEMA_VERSIONS[-1]}", "use a newer fp8pack"
        )
    try:
        return CalibrationEntry.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise InputError(f"{file} is malformed: {place[:200]!r}: {first['msg'][:200]}") from None
