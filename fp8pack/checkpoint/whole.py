"""Whether the files of a packed checkpoint are those that its manifest names: sizes, headers, digests of small files.

Weights are not read here; reading/verify.py does that.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blake3 import blake3

from fp8pack.checkpoint.header import Header
from fp8pack.checkpoint.manifest import compare_written
from fp8pack.checkpoint.manifest_schema import FileEntry, Manifest, header_differences, parse_manifest
from fp8pack.checkpoint.source import ShardReader
from fp8pack.errors import InputError, VerificationError
from fp8pack.regular_files import read_regular

_PIECE_NBYTES = 1 << 20
_COPY_AGAIN = "copy the file again"
CHANGED = "the bytes are not those that were packed"


@dataclass(frozen=True, slots=True)
class Difference:
    """What differs from what was packed: in which file, in which of its tensors, and what is wrong."""

    file: str
    problem: str
    tensor: str | None = None

    def __str__(self) -> str:
        place = f"{self.file}: {self.tensor!r}" if self.tensor else self.file
        return f"{place}: {self.problem}"


@dataclass(slots=True)
class Files:
    """What was found in the files of a manifest: their differences, and the headers of those that have none."""

    directory: Path
    manifest: Manifest | None = None
    differences: list[Difference] = field(default_factory=list)
    headers: dict[str, Header] = field(default_factory=dict)


def check_files(path: Path) -> Files:
    """Compare a manifest with its own root, and the files beside it with what it says of them; no weight is read."""
    found = Files(path.parent)
    try:
        raw = read_regular(path)
        document = json.loads(raw)
        found.manifest = parse_manifest(path, raw)
    except InputError as error:
        found.differences.append(Difference(path.name, str(error)))
    except (ValueError, RecursionError) as error:
        found.differences.append(Difference(path.name, f"it is not JSON: {error}"))
    if found.manifest is None:
        return found
    is_as_written, root = compare_written(document, raw)
    if root != found.manifest.root:
        found.differences.append(Difference(path.name, "its root is not that of its content"))
    elif not is_as_written:
        found.differences.append(Difference(path.name, "it is not written as fp8pack writes it"))
    del document, raw  # as large as the manifest, which is parsed by now
    for name, entry in found.manifest.files.items():
        found.differences += _check_file(found, name, entry)
    specs = [spec for header in found.headers.values() for spec in header.tensors]
    tensors = {name: entry for name, entry in found.manifest.tensors.items() if entry.file in found.headers}
    for file, tensor, problem in header_differences(specs, tensors):
        found.differences.append(Difference(file, problem, tensor))
        found.headers.pop(file, None)
    return found


def check_whole(path: Path) -> None:
    """Raise VerificationError with the first difference that `check_files` finds."""
    for difference in check_files(path).differences[:1]:
        raise VerificationError(str(difference), _COPY_AGAIN)


def _check_file(found: Files, name: str, entry: FileEntry) -> Iterator[Difference]:
    place = found.directory / name
    if not place.exists():
        yield Difference(name, "it is missing")
        return
    try:
        with closing(ShardReader(place)) as reader:
            if reader.size != entry.size:
                yield Difference(name, f"it has {reader.size} bytes instead of {entry.size}")
            elif entry.header is not None:
                header = reader.header()
                if header.digest == entry.header:
                    found.headers[name] = header
                else:
                    yield Difference(name, "the header is not the one that was packed")
            elif _digest(reader) != entry.digest:
                yield Difference(name, CHANGED)
    except InputError as error:
        yield Difference(name, str(error))


def digest_of_file(path: Path) -> str:
    """Return the digest of a file, empty if it cannot be read."""
    try:
        with closing(ShardReader(path)) as reader:
            return _digest(reader)
    except InputError:
        return ""


def _digest(reader: ShardReader) -> str:
    hasher, buffer = blake3(), memoryview(bytearray(min(_PIECE_NBYTES, reader.size)))
    for offset in range(0, reader.size, _PIECE_NBYTES):
        data = buffer[: reader.size - offset]
        reader.readinto(data, offset)
        hasher.update(data)
    return f"blake3:{hasher.hexdigest()}"


def other_files(directory: Path, files: Mapping[str, Any], manifest: str) -> list[str]:
    """Return the files of a directory that its manifest does not name, but for those that tools leave there."""
    found = []
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        parts = name.split("/")
        is_of_tools = any(part.startswith(".git") or part in (".cache", ".huggingface") for part in parts)
        if not path.is_dir() and name not in files and name not in (manifest, "SHA256SUMS") and not is_of_tools:
            found.append(name)
    return found
