"""`fp8pack.json`: what every tensor of a packed checkpoint is, where it came from, and the digests that prove it.

It is written as a stream, one tensor at a time, so that its size does not matter; `root` is BLAKE3 of the canonical
JSON of all the rest (sorted keys, no spaces). manifest_schema.py defines the entries and reads them back.
"""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from blake3 import blake3

from fp8pack.checkpoint.shard_writer import writing

MANIFEST_NAME = "fp8pack.json"
SCHEMA_VERSION = 1
NUMERICS_VERSION = 1

Entries = Iterable[tuple[str, dict[str, Any]]]


def write_manifest(path: Path, head: dict[str, dict[str, Any]], tensors: Entries) -> str:
    """Write a manifest and bring it to the disk; return its root.

    head: the sections `files`, `fp8pack`, `recipe` and `source`; tensors: (name, entry), sorted by name. Canonical and
    written order agree, so that the root is computed on the way.
    """
    hasher = blake3()
    with writing(path), path.open("wb") as file:
        for piece in _pieces(head, tensors, hasher):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    return _root(hasher)


def _pieces(head: dict[str, dict[str, Any]], tensors: Entries, hasher: blake3) -> Iterator[bytes]:
    """The bytes of a manifest, and what the root covers for the hasher."""
    separator = "{"
    for section in sorted([*head, "tensors"]):
        hasher.update(f'{separator}"{section}":{{'.encode())
        yield f'{separator}\n"{section}": {{'.encode()
        comma = ""
        for name, entry in tensors if section == "tensors" else sorted(head[section].items()):
            key = json.dumps(name, ensure_ascii=False)
            hasher.update(f"{comma}{key}:{canonical(entry)}".encode())
            yield f"{comma}\n  {key}: {json.dumps(entry, ensure_ascii=False)}".encode()
            comma = ","
        hasher.update(b"}")
        yield b"\n}"
        separator = ","
    hasher.update(b"}")
    yield f',\n"root": "{_root(hasher)}"\n}}\n'.encode()


def _root(hasher: blake3) -> str:
    return f"blake3:{hasher.hexdigest()}"


def compare_written(document: dict[str, Any], raw: bytes) -> tuple[bool, str]:
    """Say whether a manifest is written as `write_manifest` writes what it says; return also the root of that.

    One flipped bit may leave the same JSON value.
    """
    head = {name: section for name, section in document.items() if name not in ("tensors", "root")}
    tensors = document.get("tensors")
    if not isinstance(tensors, dict) or not all(isinstance(section, dict) for section in head.values()):
        return False, ""
    at, is_same, hasher = 0, True, blake3()
    for piece in _pieces(head, sorted(tensors.items()), hasher):
        is_same = is_same and raw[at : at + len(piece)] == piece
        at += len(piece)
    return is_same and at == len(raw), _root(hasher)


def canonical(value: Any) -> str:
    """Return JSON with sorted keys and no spaces."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def digest_of_bands(digests: Iterable[bytes]) -> str:
    """Return the digest of a tensor: BLAKE3 over the BLAKE3 digests of its bands, in order."""
    hasher = blake3()
    for digest in digests:
        hasher.update(digest)
    return f"blake3:{hasher.hexdigest()}"
