"""`calibration.safetensors`: a calibration as a safetensors file that any reader opens. docs/format.md, "Calibration".

For each site, under its first point: `<point>.bins` U16, `<point>.counts` I64, `<point>.channel_amax` BF16 [K],
`<point>.channel_squares` F64 [K], `<point>.prompt_amax` BF16 [P]; `all_experts/<point>…` for the set of all experts.
The rest is JSON in the metadata, under the key `fp8pack_calibration`.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fp8pack.checkpoint.header import build_header, read_header
from fp8pack.checkpoint.shard_writer import ShardWriter, sync_directory
from fp8pack.checkpoint.source import ShardReader, open_regular
from fp8pack.errors import InputError
from fp8pack.planning.calibration import Calibration, Site
from fp8pack.planning.layout import Stored
from fp8pack.planning.spec import TensorSpec

SCHEMA_VERSION = 1
METADATA_KEY = "fp8pack_calibration"
_ALL_EXPERTS = "all_experts/"
_INFINITY = 0x7F80
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


class CalibrationEntry(_Entry):
    """The metadata of a calibration file."""

    schema_: Annotated[int, Field(alias="schema")]
    fingerprint: str
    prompts: tuple[str, ...]
    options: dict[str, Any]
    growth_last_quarter: float | None
    sites: tuple[SiteEntry, ...]
    all_experts: tuple[SiteEntry, ...] = ()


def write_calibration(path: Path, calibration: Calibration) -> str:
    """Write a calibration file, all or nothing: a killed run leaves the old one. Return the digest of the file.

    The bytes follow from the calibration alone. Raises SpaceError when the place is not writable.
    """
    arrays = sorted(_arrays(calibration), key=lambda item: -item[1].itemsize)  # so that each lies aligned
    tensors = [Stored(name, _DTYPES[name.rpartition(".")[2]][0], array.shape) for name, array in arrays]
    begins, size = [], 0
    for stored in tensors:
        begins.append(size)
        size += stored.nbytes
    header = build_header(tensors, begins, {METADATA_KEY: json.dumps(_metadata(calibration), ensure_ascii=False)})
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    hasher = blake3(header)
    try:
        with closing(ShardWriter(temporary, create=True)) as writer:
            writer.start(header, len(header) + size)
            for (_, array), begin in zip(arrays, begins, strict=True):
                data = memoryview(array.tobytes())
                hasher.update(data)
                writer.write(data, len(header) + begin)
            writer.sync()
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)
    return f"blake3:{hasher.hexdigest()}"


def read_calibration(path: Path) -> Calibration:
    """Read and check a calibration file.

    Raises:
        InputError: it is no calibration of fp8pack, of a schema that this version does not know, or malformed.
    """
    fd = open_regular(path)
    try:
        header = read_header(fd, path.name)
        size = os.fstat(fd).st_size
    finally:
        os.close(fd)
    entry = _parse_metadata(header.metadata, path.name)
    data = bytearray(size)
    with closing(ShardReader(path)) as reader:
        reader.readinto(memoryview(data), 0)
    reading = _Reading(path.name, {spec.name: spec for spec in header.tensors}, data, len(entry.prompts))
    calibration = Calibration(
        entry.fingerprint,
        entry.prompts,
        entry.options,
        tuple(reading.site("", site) for site in entry.sites),
        tuple(reading.site(_ALL_EXPERTS, site) for site in entry.all_experts),
        f"blake3:{blake3(data).hexdigest()}",
    )
    if reading.specs:
        raise InputError(f"{path.name}: tensor {min(reading.specs)!r} belongs to no site")
    points = [point for site in entry.sites for point in site.points]
    if len(set(points)) != len(points) or len(set(entry.prompts)) != len(entry.prompts):
        raise InputError(f"{path.name}: a point or a prompt appears twice")
    return calibration


def is_calibration(path: Path) -> bool:
    """Say whether a file is a calibration; InputError if it is no well-formed safetensors file."""
    fd = open_regular(path)
    try:
        return METADATA_KEY in read_header(fd, path.name).metadata
    finally:
        os.close(fd)


@dataclass
class _Reading:
    """The tensors of a file that no site has taken yet."""

    file: str
    specs: dict[str, TensorSpec]
    data: bytearray
    num_prompts: int

    def site(self, prefix: str, entry: SiteEntry) -> Site:
        name = prefix + entry.points[0]
        bins, counts, amax, squares, prompts = (self._array(f"{name}.{kind}") for kind in _DTYPES)
        largest = int(bins[-1]) if bins.size else 0
        sound = (
            bins.shape == counts.shape
            and bool((np.diff(bins.astype(np.int64)) > 0).all() and (counts > 0).all())
            and amax.size == squares.size > 0
            and int(counts.sum()) == entry.tokens * amax.size
            and largest == int(amax.max())
            and largest == int(prompts.max(initial=0))
            and largest < _INFINITY
            and prompts.size == self.num_prompts
            and bool((np.isfinite(squares) & (squares >= 0)).all())
        )
        if not sound:
            raise InputError(f"{self.file}: the statistics of {name!r} contradict each other: calibrate again")
        return Site(entry.points, entry.tokens, bins, counts, amax, squares, prompts)

    def _array(self, name: str) -> NDArray[Any]:
        spec = self.specs.pop(name, None)
        dtype, kind = _DTYPES[name.rpartition(".")[2]]
        if spec is None or spec.dtype != dtype or len(spec.shape) != 1:
            raise InputError(f"{self.file}: tensor {name!r} is missing, or no {dtype} of one dimension")
        return np.frombuffer(self.data, kind, spec.shape[0], spec.begin)


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
        "options": dict(calibration.options),
        "growth_last_quarter": growth if math.isfinite(growth) else None,
        "sites": [{"points": list(site.points), "tokens": site.tokens} for site in calibration.sites],
    }
    if calibration.all_experts:
        sites = [{"points": list(site.points), "tokens": site.tokens} for site in calibration.all_experts]
        document["all_experts"] = sites
    return document


def _parse_metadata(metadata: Mapping[str, str], file: str) -> CalibrationEntry:
    try:
        document = json.loads(metadata[METADATA_KEY])
        schema = document["schema"]
    except (KeyError, ValueError, TypeError, RecursionError):
        raise InputError(f"{file} is no calibration file of fp8pack") from None
    if schema != SCHEMA_VERSION:
        raise InputError(f"{file} has schema {schema}, this version reads {SCHEMA_VERSION}: use a newer one")
    try:
        return CalibrationEntry.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{file} is malformed: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
