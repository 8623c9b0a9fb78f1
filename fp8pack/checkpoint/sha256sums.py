"""SHA256SUMS: the sums that hubs and people compare, in the lines of `sha256sum`."""

import hashlib
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fp8pack.checkpoint.shard_writer import sync_directory, write_file, writing
from fp8pack.checkpoint.whole import Difference, other_files
from fp8pack.errors import InputError
from fp8pack.machine import usable_cores
from fp8pack.regular_files import open_regular, read_regular

SUMS_NAME = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")


def sum_files(path: Path, *, may_write: bool) -> list[Difference]:
    """Return what differs from SHA256SUMS, or write it if it is not there and may be written.

    path: a directory, whose files are all summed, or a single file, whose sum is in NAME.sha256.

    Raises:
        SpaceError: it cannot be written.
    """
    directory = path if path.is_dir() else path.parent
    names = other_files(path, {}, "") if path.is_dir() else [path.name]
    sums_path = directory / (SUMS_NAME if path.is_dir() else f"{path.name}.sha256")
    with ThreadPoolExecutor(usable_cores()) as pool:
        found = dict(zip(names, pool.map(lambda name: _sum(directory / name), names), strict=True))
    if sums_path.exists():
        return list(_compare(sums_path, found))
    if not may_write:
        return []
    temporary = sums_path.with_name(f".{sums_path.name}.{os.getpid()}")
    write_file(temporary, "".join(f"{digest}  {name}\n" for name, digest in found.items()).encode())
    with writing(sums_path):
        temporary.replace(sums_path)
    sync_directory(directory)
    return []


def _compare(path: Path, found: dict[str, str]) -> Iterator[Difference]:
    stated: dict[str, str] = {}
    for number, line in enumerate(read_regular(path).decode(errors="replace").splitlines(), 1):
        if (match := _LINE.fullmatch(line)) is None:
            yield Difference(path.name, f"line {number} is no line of sha256sum")
        else:
            stated[match[2]] = match[1]
    for name, digest in stated.items():
        if name not in found:
            yield Difference(name, f"it is in {path.name} and missing")
        elif found[name] != digest:
            yield Difference(name, f"its SHA-256 is not the one in {path.name}")


def _sum(path: Path) -> str:
    fd = open_regular(path)
    try:
        with os.fdopen(fd, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path.name} cannot be read: {str(error.strerror).lower()}") from None
