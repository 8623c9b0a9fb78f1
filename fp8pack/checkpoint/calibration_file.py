"""`calibration.safetensors`: a calibration as a safetensors file that any reader opens. docs/format.md, "Calibration".

For each site, under its first point: `<point>.bins` U16, `<point>.counts` I64, `<point>.channel_amax` BF16 [K],
`<point>.channel_squares` F64 [K], `<point>.prompt_amax` BF16 [P]; `all_experts/<point>…` for the set of all experts.
The rest is JSON in the metadata, under the key `fp8pack_calibration`.
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
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
from fp8pack.modelfacts.spec import Stored, TensorSpec
from fp8pack.planning.calibration import INFINITY, NUM_MAGNITUDES, Calibration, Site

SCHEMA_VERSION = 1
METADATA_KEY = "fp8pack_calibration"
_ALL_EXPERTS = "all_experts/"
_MAX_CHANNELS = 1 << 24
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
    """A site: the names it goes by, and how many tokens passed it."""

    points: Annotated[tuple[str, ...], Field(min_length=1)]
    tokens: Annotated[int, Field(ge=0)]
    heads: Annotated[int, Field(ge=1)] = 1


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
    arrays = sorted(_arrays(calibration), key=lambda item: -item[1].itemsize)  # so that each lies aligned
    tensors = [Stored(name, _DTYPES[name.rpartition(".")[2]][0], array.shape) for name, array in arrays]
    begins, size = [], 0
    for stored in tensors:
        begins.append(size)
        size += stored.nbytes
    header = build_header(tensors, begins, {METADATA_KEY: json.dumps(_metadata(calibration), ensure_ascii=False)})
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with closing(ShardWriter(temporary, create=True)) as writer:
            writer.start(header, len(header) + size)
            for (_, array), begin in zip(arrays, begins, strict=True):
                writer.write(memoryview(array.tobytes()), len(header) + begin)
            writer.sync()
        with writing(path):
            temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink()
    sync_directory(path.parent)


def read_calibration(path: Path) -> Calibration:
    """Read and check a calibration file.

    Raises:
        InputError: it is no calibration of fp8pack, of a schema that this version does not know, or malformed.
    """
    if not path.exists():
        raise InputError(f"{path} does not exist")
    with closing(ShardReader(path)) as reader:
        header = reader.header()
        entry = _parse_metadata(header.metadata, path.name)
        specs = {spec.name: spec for spec in header.tensors}
        _check_tensors(entry, specs, path.name)  # before a byte of them is read: sizes are bounded from here on
        data = bytearray(reader.size)
        reader.readinto(memoryview(data), 0)

    def site(prefix: str, found: SiteEntry) -> Site:
        arrays: list[NDArray[Any]] = []
        for kind, (_, dtype) in _DTYPES.items():
            spec = specs[f"{prefix}{found.points[0]}.{kind}"]
            arrays.append(np.frombuffer(data, dtype, spec.shape[0], spec.begin))
        read = Site(found.points, found.tokens, arrays[0], arrays[1], arrays[2], arrays[3], arrays[4], found.heads)
        if not _is_sound(read):
            name = f"{prefix}{found.points[0]}"
            raise InputError(f"{path.name}: the statistics of {name[:200]!r} contradict each other", "calibrate again")
        return read

    return Calibration(
        entry.fingerprint,
        entry.prompts,
        entry.options,
        tuple(site("", found) for found in entry.sites),
        tuple(site(_ALL_EXPERTS, found) for found in entry.all_experts),
        f"blake3:{blake3(data).hexdigest()}",
        entry.num_tokens,
    )


def is_calibration(path: Path) -> bool:
    """Say whether a file is a calibration; InputError if it is no well-formed safetensors file."""
    with closing(ShardReader(path)) as reader:
        return METADATA_KEY in reader.header().metadata


def _check_tensors(entry: CalibrationEntry, specs: Mapping[str, TensorSpec], file: str) -> None:
    """Each site has its tensors, of sizes that can be, and there are no others."""
    expected = {f"{prefix}{site.points[0]}.{kind}" for prefix, site in _sites(entry) for kind in _DTYPES}
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
        if bins != counts or bins > NUM_MAGNITUDES or amax != squares or amax > _MAX_CHANNELS:
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


def _arrays(calibration: Calibration) -> Iterator[tuple[str, NDArray[Any]]]:
    for prefix, sites in (("", calibration.sites), (_ALL_EXPERTS, calibration.all_experts)):
        for site in sites:
            values: list[NDArray[Any]] = [site.bins, site.counts, site.channel_amax, site.channel_squares]
            values.append(site.prompt_amax)
            for (kind, (_, dtype)), array in zip(_DTYPES.items(), values, strict=True):
                yield f"{prefix}{site.points[0]}.{kind}", array.astype(dtype, copy=False)


def _metadata(calibration: Calibration) -> dict[str, Any]:
    growth = calibration.growth
    document: dict[str, Any] = {
        "schema": SCHEMA_VERSION,
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
    return {"points": list(site.points), "tokens": site.tokens, **heads}


def _parse_metadata(metadata: Mapping[str, str], file: str) -> CalibrationEntry:
    try:
        document = json.loads(metadata[METADATA_KEY])
        schema = document["schema"]
        json.dumps(document, ensure_ascii=False).encode()  # half of a surrogate pair could not be written again
    except (KeyError, ValueError, TypeError, RecursionError):
        raise InputError(
            f"{file} is not a calibration file of fp8pack", "`fp8pack calibrate MODEL` writes one"
        ) from None
    if schema != SCHEMA_VERSION:
        raise InputError(
            f"{file} has schema {str(schema)[:40]!r}, this version reads {SCHEMA_VERSION}", "use a newer fp8pack"
        )
    try:
        return CalibrationEntry.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise InputError(f"{file} is malformed: {place[:200]!r}: {first['msg'][:200]}") from None
