"""Files of a source are opened first and looked at then: what is checked is what is read, and what is read later."""

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from fp8pack.errors import InputError

_MOST_OPEN = 8


@dataclass(frozen=True, slots=True)
class FileVersion:
    """What tells a file from another one, and from itself after a change; times in nanoseconds."""

    device: int
    inode: int
    size: int
    modified: int
    changed: int


def version_of(status: os.stat_result) -> FileVersion:
    """Return the version of a file."""
    return FileVersion(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def open_regular(path: Path) -> int:
    """Open a regular file for reading; a FIFO, device or directory is refused, and a FIFO without a writer never hangs.

    Raises:
        InputError: it is missing, cannot be read, or is no regular file.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except FileNotFoundError:
        raise InputError(f"{path.name} is missing in {path.parent}") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a file name"
        raise InputError(f"{str(path)[:200]!r} cannot be read: {reason}") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise InputError(f"{path.name} is not a regular file")
    return fd


def read_regular(path: Path) -> bytes:
    """Return the bytes of a regular file; raises as `open_regular` and `fill` do."""
    fd = open_regular(path)
    try:
        return read_range(fd, os.fstat(fd).st_size, 0, path.name)
    finally:
        os.close(fd)


def read_range(fd: int, nbytes: int, offset: int, name: str) -> bytes:
    """Return the bytes at an offset of an open file; raises as `fill` does."""
    data = bytearray(nbytes)
    fill(fd, memoryview(data), offset, name)
    return bytes(data)


def fill(fd: int, buffer: memoryview, offset: int, name: str) -> None:
    """Fill a buffer with the bytes at an offset of an open file.

    Raises:
        InputError: the file ends before, or the disk does not give the bytes.
    """
    filled = 0
    while filled < len(buffer):
        try:
            got = os.preadv(fd, [buffer[filled:]], offset + filled)
        except OSError as error:
            reason = str(error.strerror).lower()
            raise InputError(f"{name} cannot be read at byte {offset + filled}: {reason}") from None
        if got == 0:
            raise InputError(f"{name} was truncated during reading", "run again without changing the source")
        filled += got


def check_link(directory: Path, name: str) -> Path:
    """Return the file that a name of a model directory stands for: itself, or where it links to.

    Raises:
        InputError: it links to itself, or to what is neither in the model nor among the blobs of the hub cache.
    """
    path = directory / name
    if not path.is_symlink():
        return path
    try:
        target = path.resolve()
    except (OSError, RuntimeError):
        raise InputError(f"{name} links to itself", "remove the link") from None
    inside = [directory.resolve()]
    if directory.absolute().parent.name == "snapshots":
        inside.append(directory.absolute().parent.parent.resolve() / "blobs")
    if not any(target.is_relative_to(folder) for folder in inside):
        raise InputError(f"{name} links to {target}, outside the model", "replace the link by the file, or remove it")
    return target


class _Closes(Protocol):
    def close(self) -> None: ...


_T = TypeVar("_T", bound=_Closes)


class FewOpen(Generic[_T]):
    """Files that stay open, by name, and no more than a few: a checkpoint may have more than a process may open."""

    def __init__(self) -> None:
        self._open: dict[str, _T] = {}

    def get(self, name: str, open_it: Callable[[str], _T]) -> _T:
        """Return an open file, opened if it is not."""
        if name not in self._open:
            while len(self._open) >= _MOST_OPEN:
                self._open.pop(next(iter(self._open))).close()  # the one that was opened first
            self._open[name] = open_it(name)
        return self._open[name]

    def close(self) -> None:
        """Close them all."""
        for file in self._open.values():
            file.close()
        self._open.clear()
