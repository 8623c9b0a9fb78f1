"""The manifest's entries as pydantic models: they read `fp8pack.json` back and publish its schema."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fp8pack.checkpoint.manifest import MANIFEST_NAME, SCHEMA_VERSION
from fp8pack.errors import InputError, VerificationError
from fp8pack.modelfacts.spec import TensorSpec
from fp8pack.numerics.formats import FORMATS
from fp8pack.regular_files import read_regular

_COPY_AGAIN = "copy the files again from where they were packed"
_DTYPES = {format.name: format.dtype for format in FORMATS}

Digest = Annotated[str, Field(pattern=r"^blake3:[0-9a-f]{64}$")]
GranularityName = Annotated[
    str, Field(pattern=r"^(tensor|channel|mx|group:[1-9]\d{0,8}|block:[1-9]\d{0,4}x[1-9]\d{0,8})$")
]
Shape = list[Annotated[int, Field(ge=0)]]


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True)


class ScaleEntry(_Entry):
    """The scale tensor beside a payload: the multiplier that dequantizes, under the convention's name."""

    tensor: str
    dtype: Literal["F32", "U8"]
    shape: Shape
    layout: Literal["tiles of 128 x 4"] | None = None
    dequantize: str
    digest: Digest


class StoredEntry(_Entry):
    """A small tensor stored beside a weight, by which a convention announces it."""

    tensor: str
    dtype: str
    shape: Shape
    digest: Digest


class OriginEntry(_Entry):
    """How a weight that was quantized already is stored in the source; without a scale its bytes were its values."""

    format: Literal["e4m3", "e5m2", "e2m1", "int4", "int8"]
    granularity: str
    scale: str | None


class ActivationEntry(_Entry):
    """A calibrated scale stored beside a tensor, for what enters a weight or for K or V of the cache.

    `value` is the multiplier that dequantizes; `amax_history_seed` the amax of each prompt, in order; `source` who saw
    it: the tokens that came here, all tokens, or those of the other experts.
    """

    kind: Literal["input", "k", "v"]
    point: str
    source: Literal["routed", "all_experts", "peers"]
    tensor: str
    dtype: Literal["F32"]
    shape: Shape
    value: float
    amax: float
    amax_history_seed: list[float]
    digest: Digest


class PackedEntry(_Entry):
    """A packed weight [N, K].

    `block` is the region that shares a scale; `tensor` the payload's name, where a convention gives it another;
    `carried` says that the FP8 bytes are those of the source. `band_rows` rows (and `band_cols` columns, where rows are
    cut) are the unit of its digest.
    """

    action: Literal["packed"]
    role: str
    reason: str
    file: str
    format: Literal["e4m3", "e5m2"]
    granularity: GranularityName
    block: tuple[int, int]
    layout: Literal["row-major [N, K]"]
    tensor: str | None = None
    shape: tuple[int, int]
    source_dtype: Literal["BF16", "F16", "F32"]
    scale_inv: ScaleEntry
    carried: bool = False
    origin: Annotated[OriginEntry | None, Field(alias="from")] = None
    amax: float
    activation_scales: tuple[ActivationEntry, ...] = ()
    markers: tuple[StoredEntry, ...] = ()
    band_rows: int
    band_cols: int | None = None
    digest: Digest


class CopiedEntry(_Entry):
    """A tensor that was carried over byte for byte, and why."""

    action: Literal["copied"]
    role: str
    reason: str
    file: str
    dtype: str
    shape: Shape
    activation_scales: tuple[ActivationEntry, ...] = ()
    digest: Digest


class CastEntry(_Entry):
    """A float that is stored in another dtype than the source has, rounded once; digested as a copy is."""

    action: Literal["cast"]
    role: str
    reason: str
    file: str
    dtype: Literal["BF16", "F16"]
    shape: Shape
    source_dtype: Literal["BF16", "F16", "F32"]
    activation_scales: tuple[ActivationEntry, ...] = ()
    digest: Digest


class UnpackedEntry(_Entry):
    """A tensor that was quantized, and is stored as its values; `band_rows` and `band_cols` as of a packed one."""

    action: Literal["unpacked"]
    role: str
    reason: str
    file: str
    dtype: str
    shape: Shape
    origin: Annotated[OriginEntry | None, Field(alias="from")] = None
    activation_scales: tuple[ActivationEntry, ...] = ()
    band_rows: int
    band_cols: int | None = None
    digest: Digest


Entry: TypeAlias = PackedEntry | CopiedEntry | CastEntry | UnpackedEntry


class FileEntry(_Entry):
    """A file of the output; the digests of its header and its tensors prove a shard."""

    size: Annotated[int, Field(ge=0)]
    header: Digest | None = None
    digest: Digest | None = None


class Versions(_Entry):
    """The versions of this file's schema and of the numerics that made the bytes."""

    schema_: Annotated[int, Field(alias="schema")]
    numerics: int


class SourceEntry(_Entry):
    """What was packed: its fingerprint, and the sizes of its files."""

    fingerprint: Digest
    files: dict[str, FileEntry]


class Manifest(_Entry):
    """`fp8pack.json`."""

    fp8pack: Versions
    source: SourceEntry
    recipe: dict[str, Any]
    tensors: dict[str, Annotated[PackedEntry | CopiedEntry | CastEntry | UnpackedEntry, Field(discriminator="action")]]
    files: dict[str, FileEntry]
    root: Digest

    def check_header(self, file: str, digest: str) -> None:
        """Raise VerificationError unless a shard's header has this digest."""
        entry = self.files.get(file)
        if entry is None or entry.header != digest:
            raise VerificationError(f"{file}: the header is not the one that was packed", "copy the file again")


class _Schema(_Entry):
    number: Annotated[int, Field(alias="schema")]


class _Head(_Entry):
    fp8pack: _Schema


def find_manifest(path: Path) -> Path | None:
    """Return the manifest of a packed checkpoint, a directory or a single file; None if there is none."""
    found = path / MANIFEST_NAME if path.is_dir() else path.with_suffix(".fp8pack.json")
    return found if found.exists() else None


def read_manifest(path: Path) -> Manifest:
    """Read and check a manifest.

    Raises:
        InputError: it is malformed, or of a schema that this version does not know.
    """
    return parse_manifest(path, read_regular(path))


def parse_manifest(path: Path, raw: bytes) -> Manifest:
    """Return what the bytes of a manifest say; raises as `read_manifest` does."""
    try:
        manifest = Manifest.model_validate_json(raw)
    except ValidationError as error:
        _check_schema(path, raw)
        first = error.errors()[0]
        raise InputError(f"{path} is malformed: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    _check_schema(path, raw, manifest)
    return manifest


def _check_schema(path: Path, raw: bytes, manifest: Manifest | None = None) -> None:
    """Raise InputError unless a manifest, or what may be one, has the schema that this version knows."""
    try:
        schema = manifest.fp8pack.schema_ if manifest else _Head.model_validate_json(raw).fp8pack.number
    except ValidationError:
        raise InputError(f"{path} is no manifest of fp8pack") from None
    if schema != SCHEMA_VERSION:
        raise InputError(f"{path} has schema {schema}, this version reads {SCHEMA_VERSION}", "use a newer fp8pack")


def check_headers(specs: Sequence[TensorSpec], manifest: Manifest) -> None:
    """Raise InputError unless every tensor of the manifest lies in its file, as it says, and nothing else does."""
    for _, tensor, problem in header_differences(specs, manifest.tensors):
        raise InputError(f"tensor {tensor!r} {problem}: the files were changed after packing", _COPY_AGAIN)


def header_differences(specs: Sequence[TensorSpec], tensors: Mapping[str, Entry]) -> Iterator[tuple[str, str, str]]:
    """Yield where headers differ from a manifest: the file, the tensor, and what is wrong."""
    found = {spec.name: spec for spec in specs}
    for name, entry in tensors.items():
        for stored, dtype, shape in _stored(name, entry):
            spec = found.pop(stored, None)
            if spec is None:
                yield entry.file, stored, "is missing"
            elif (spec.file, spec.dtype, spec.shape) != (entry.file, dtype, tuple(shape)):
                yield spec.file, stored, "differs from fp8pack.json"
    for spec in found.values():
        yield spec.file, spec.name, "is not in fp8pack.json"


def _stored(name: str, entry: Entry) -> Iterator[tuple[str, str, Sequence[int]]]:
    """The tensors of the files that an entry is about: name, dtype and shape."""
    small: tuple[ScaleEntry | ActivationEntry | StoredEntry, ...] = entry.activation_scales
    if isinstance(entry, PackedEntry):
        yield entry.tensor or name, _DTYPES[entry.format], entry.shape
        small = (*small, entry.scale_inv, *entry.markers)
    else:
        yield name, entry.dtype, entry.shape
    for scale in small:
        yield scale.tensor, scale.dtype, scale.shape
