"""Machine code of the kernels, kept between runs in a directory that only this user can write in.

It is $FP8PACK_CACHE_DIR or $XDG_CACHE_HOME/fp8pack or ~/.cache/fp8pack. Where there is none that is safe, nothing is
kept: what lies there is run as code.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from blake3 import blake3

_DIGEST_NBYTES = 32


def read_code(name: str) -> bytes | None:
    """Return machine code by its name, None if it is not there, not whole, or may have been written by others."""
    with suppress(OSError), _open_folder() as folder:
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
        with os.fdopen(fd, "rb") as file:
            status = os.fstat(fd)
            if stat.S_ISREG(status.st_mode) and status.st_nlink == 1 and _is_ours(status):
                data = file.read()
                code = data[_DIGEST_NBYTES:]
                return code if blake3(code).digest() == data[:_DIGEST_NBYTES] else None
    return None


def write_code(name: str, code: bytes) -> None:
    """Keep machine code under a name, if there is a place for it."""
    temporary = f"{name}.{os.getpid()}"
    with suppress(OSError), _open_folder() as folder:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            with os.fdopen(os.open(temporary, flags, 0o600, dir_fd=folder), "wb") as file:
                file.write(blake3(code).digest() + code)
            os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
        except OSError:
            os.unlink(temporary, dir_fd=folder)


@contextmanager
def _open_folder() -> Iterator[int]:
    """Open the directory, which is made if it can be; OSError if there is none, or others may write in it."""
    path = cache_dir()
    if path is None:
        raise FileNotFoundError
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if not _is_ours(os.fstat(folder)):
            raise PermissionError
        yield folder
    finally:
        os.close(folder)


def cache_dir() -> Path | None:
    """Return the directory that the environment names; None for a user without a home, as a container's may be."""
    if configured := os.environ.get("FP8PACK_CACHE_DIR"):
        return Path(configured)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fp8pack"
    except RuntimeError:
        return None


def _is_ours(status: os.stat_result) -> bool:
    """Say whether nobody but this user, or root, can write in it."""
    return status.st_uid in (os.geteuid(), 0) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
