"""The safetensors header: a strict reader, and the builder.

The reader refuses more than the safetensors library does: duplicate names, entries that are no objects, control
characters in names, absurd ranks; tests/hostile/test_hostile_header.py lists the cases. Nothing here trusts a
length before it is checked against the file.
"""

import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any, NoReturn

from blake3 import blake3

from fp8pack.errors import InputError
from fp8pack.modelfacts.spec import DTYPE_BITS, Stored, TensorSpec, nbytes_of
from fp8pack.regular_files import read_range

MAX_HEADER_NBYTES = 100_000_000  # the safetensors library's own limit
DATA_ALIGNMENT = 4096
_MAX_RANK = 64
_MAX_DIM = 2**48
_MAX_FILE_NBYTES = 2**63
_MAX_NAME = 4096
LENGTH_NBYTES = 8
_FIELDS = frozenset(("dtype", "shape", "data_offsets"))
_MAX_DEPTH = 64
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


@dataclass(frozen=True, slots=True)
class Header:
    """A parsed header: tensors with offsets in the file, the free-text metadata, and where the data begins.

    digest: BLAKE3 over its length, 8 bytes, and its bytes.
    """

    tensors: tuple[TensorSpec, ...]
    metadata: Mapping[str, str]
    data_begin: int
    digest: str


def read_header(fd: int, file: str) -> Header:
    """Read and check the header of an open safetensors file.

    Raises:
        InputError: with the file, the tensor and what is wrong, for anything but a well-formed file whose tensors
            tile its data section exactly.
    """
    size = os.fstat(fd).st_size
    prefix = read_range(fd, min(64, size), 0, file)
    if prefix.startswith(b"version https://git-lfs"):
        raise InputError(f"{file} is a Git LFS pointer, not the file", "run `git lfs pull`")
    if prefix.startswith(b"GGUF"):
        raise InputError(f"{file} is a GGUF file, not safetensors", "pack the BF16 safetensors it was made from")
    if len(prefix) < LENGTH_NBYTES:
        raise InputError(f"{file} has {size} bytes: not a safetensors file")
    length = int.from_bytes(prefix[:LENGTH_NBYTES], "little")
    if not 2 <= length <= MAX_HEADER_NBYTES:
        raise InputError(
            f"{file} has a header length of {length} bytes: not a safetensors file, or damaged", "download it again"
        )
    if LENGTH_NBYTES + length > size:
        raise InputError(
            f"{file} has {size} bytes but its header alone needs {LENGTH_NBYTES + length}", "download it again"
        )
    raw = read_range(fd, length, LENGTH_NBYTES, file)
    return parse_header(raw, file, size)


def parse_header(raw: bytes, file: str, size: int) -> Header:
    """Check the header bytes of a safetensors file of `size` bytes; raises as `read_header` does."""
    data_begin = LENGTH_NBYTES + len(raw)
    document = _parse_json(raw, file)
    metadata = document.pop("__metadata__", None)
    specs = [_parse_entry(name, entry, file, data_begin) for name, entry in document.items()]
    specs.sort(key=lambda spec: (spec.begin, spec.end))
    position = data_begin
    for spec in specs:
        if spec.begin != position:
            problem = (
                "overlaps the tensor before it"
                if spec.begin < position
                else f"leaves a hole of {spec.begin - position} bytes before it"
            )
            raise InputError(f"{file}: tensor {spec.name!r} {problem}")
        position = spec.end
    if position != size:
        if size < position:
            raise InputError(f"{file}: {position - size} bytes are missing", "download it again")
        raise InputError(f"{file}: {size - position} bytes follow the last tensor")
    digest = blake3(len(raw).to_bytes(LENGTH_NBYTES, "little")).update(raw).hexdigest()
    return Header(tuple(specs), _parse_metadata(metadata, file), data_begin, f"blake3:{digest}")


def build_header(tensors: Sequence[Stored], begins: Sequence[int], metadata: Mapping[str, str]) -> bytes:
    """Return the length prefix and header, padded with spaces so that the data section starts at a multiple of 4096."""
    document: dict[str, Any] = {"__metadata__": dict(metadata)}
    for stored, begin in zip(tensors, begins, strict=True):
        offsets = [begin, begin + stored.nbytes]
        document[stored.name] = {"dtype": stored.dtype, "shape": list(stored.shape), "data_offsets": offsets}
    raw = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
    if len(raw) > MAX_HEADER_NBYTES:
        raise InputError(
            f"a header of {len(raw)} bytes is over the limit of safetensors",
            "--max-shard-size 5GB splits it into shards",
        )
    raw += b" " * (-(LENGTH_NBYTES + len(raw)) % DATA_ALIGNMENT)
    return len(raw).to_bytes(LENGTH_NBYTES, "little") + raw


def _parse_json(raw: bytes, file: str) -> dict[str, Any]:
    def refuse_constant(text: str) -> NoReturn:
        raise ValueError(f"{text} is not JSON")

    def refuse_minus_zero(text: str) -> int:
        if text == "-0":
            raise ValueError("-0 is no whole number")
        return int(text)

    def refuse_infinity(text: str) -> float:
        if math.isinf(float(text)):
            raise ValueError(f"{text[:40]} is no number")
        return float(text)

    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            name = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
            raise ValueError(f"{name[:200]!r} appears twice")
        return found

    hooks: dict[str, Any] = {"parse_constant": refuse_constant, "parse_float": refuse_infinity}
    hooks["object_pairs_hook"] = refuse_duplicates
    if b"-0" in raw:
        hooks["parse_int"] = refuse_minus_zero
    try:
        document = json.loads(raw.decode(), **hooks)
        if re.search(rb"\\u[dD][89a-fA-F]", raw):
            json.dumps(document, ensure_ascii=False).encode()  # a surrogate without its other half does not encode
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: the header is malformed: {error}") from None
    if not isinstance(document, dict):
        raise InputError(f"{file}: the header is malformed: not a JSON object")
    return document


def _parse_metadata(metadata: Any, file: str) -> Mapping[str, str]:
    if metadata is None:
        return {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputError(f"{file}: __metadata__ is malformed: it must map text to text")
    return metadata


def _parse_entry(name: str, entry: Any, file: str, data_begin: int) -> TensorSpec:
    def refuse(problem: str) -> NoReturn:
        raise InputError(f"{file}: tensor {name[:200]!r} {problem}")

    if not name or len(name) > _MAX_NAME or _CONTROL.search(name):
        refuse("has a name that is empty, over 4096 characters, or contains control characters")
    if not isinstance(entry, dict) or not entry.keys() >= _FIELDS:
        refuse("has no dtype, shape and data_offsets")
    if len(entry) > len(_FIELDS) and not _is_shallow(entry, _MAX_DEPTH):
        refuse("has fields that are nested too deep")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        refuse(f"has a dtype that is not known: {str(dtype)[:40]!r}")
    if not _is_ints(shape, _MAX_DIM) or len(shape) > _MAX_RANK:
        refuse("has a malformed shape")
    if not _is_ints(offsets, _MAX_FILE_NBYTES) or len(offsets) != 2 or offsets[0] > offsets[1]:
        refuse("has malformed data_offsets")
    try:
        expected = nbytes_of(dtype, tuple(shape))
    except ValueError as error:
        refuse(str(error))
    if offsets[1] - offsets[0] != expected or (0 in shape and prod(max(dim, 1) for dim in shape) > 2**63):
        refuse(f"spans {offsets[1] - offsets[0]} bytes, but {dtype} {str(shape)[:80]} needs {expected}")
    begin, end = data_begin + offsets[0], data_begin + offsets[1]
    return TensorSpec(name, sys.intern(dtype), _shared(tuple(shape)), file, begin, end)


@lru_cache(maxsize=1024)
def _shared(shape: tuple[int, ...]) -> tuple[int, ...]:
    """One object for each shape: a model has many tensors of few shapes."""
    return shape


def _is_ints(values: Any, largest: int) -> bool:
    if not isinstance(values, list):
        return False
    for value in values:  # noqa: SIM110  (a generator for `all` costs as much as the rest of a header)
        if type(value) is not int or not 0 <= value <= largest:
            return False
    return True


def _is_shallow(value: Any, depth: int) -> bool:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return depth > 0 and all(_is_shallow(child, depth - 1) for child in children)
