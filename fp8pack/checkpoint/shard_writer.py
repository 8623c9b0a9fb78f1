"""Writing one output shard: its size is reserved first, then bytes go to the offsets that the plan gave them."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from safetensors import safe_open

from fp8pack.errors import SpaceError, VerificationError
from fp8pack.planning.layout import ShardPlan
from fp8pack.units import format_size

_FULL = (errno.ENOSPC, errno.EDQUOT)


class ShardWriter:
    """One shard of known size, open for writing from several threads at once."""

    def __init__(self, path: Path, *, create: bool = False) -> None:
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT if create else 0)
        with writing(path):
            self._fd = os.open(path, flags, 0o666)
        self.path = path

    def start(self, header: bytes, size: int) -> None:
        """Empty the file, take its final size from the disk where that costs nothing, and write the header."""
        with writing(self.path):
            os.ftruncate(self._fd, 0)
            if size and _has_extents(self.path):
                os.posix_fallocate(self._fd, 0, size)
            os.ftruncate(self._fd, size)
        self.write(memoryview(header), 0)

    def write(self, data: memoryview, offset: int) -> None:
        """Write all bytes at this offset of the file."""
        with writing(self.path):
            written = 0
            while written < len(data):
                written += os.pwrite(self._fd, data[written:], offset + written)

    def sync(self) -> None:
        """Return when what was written is on the disk."""
        with writing(self.path):
            os.fdatasync(self._fd)

    def close(self) -> None:
        """Close the file; a second time does nothing, since the number may be another file's by then."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


@cache
def _mounts() -> dict[str, str]:
    """The file system type of each device, by the kernel's own table; empty where there is none."""
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    return {line.split()[2]: line.rpartition(" - ")[2].split()[0] for line in lines}


def _has_extents(path: Path) -> bool:
    """Whether reserving is a note in a tree; elsewhere, on tmpfs say, it would touch every page once more."""
    device = path.stat().st_dev
    return _mounts().get(f"{os.major(device)}:{os.minor(device)}") in ("ext4", "xfs", "btrfs", "f2fs")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the file system refuses into a SpaceError that names the file."""
    try:
        yield
    except OSError as error:
        reason = "no space left" if error.errno in _FULL else str(error.strerror or error).lower()
        raise SpaceError(
            f"{path} cannot be written: {reason}", "the same command continues where this one stopped"
        ) from None


def free_space(directory: Path) -> int:
    """Return the free bytes of the file system of a directory."""
    with writing(directory):
        free = os.statvfs(directory)
    return free.f_bavail * free.f_frsize


def check_space(directory: Path, needed: int) -> None:
    """Raise SpaceError if the file system of a directory has fewer free bytes than are needed."""
    available = free_space(directory)
    if available < needed:
        raise SpaceError(
            f"{directory} has {format_size(available)} free, {format_size(needed)} are needed",
            "make room, or choose another -o",
        )


def check_shard(path: Path, plan: ShardPlan) -> None:
    """Raise VerificationError unless the safetensors library sees the planned names, dtypes and shapes in a file."""
    with safe_open(path, framework="numpy") as opened:
        if set(opened.keys()) != {stored.name for stored in plan.tensors}:
            raise VerificationError(f"{path} does not contain the planned tensors", "run again with --no-resume")
        for stored in plan.tensors:
            view = opened.get_slice(stored.name)
            if (view.get_dtype(), tuple(view.get_shape())) != (stored.dtype, stored.shape):
                raise VerificationError(
                    f"{path}: tensor {stored.name!r} is not as planned", "run again with --no-resume"
                )


def write_file(path: Path, data: bytes) -> None:
    """Write a small file and bring it to the disk."""
    writer = ShardWriter(path, create=True)
    try:
        writer.start(data, len(data))
        writer.sync()
    finally:
        writer.close()


def replace_file(path: Path, content: bytes) -> None:
    """Write a file whole: another one there is replaced at the end. Raises SpaceError as `write_file` does."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write_file(temporary, content)
        with writing(path):
            temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def sync_file(path: Path) -> None:
    """Return when everything that was written into a file is on the disk."""
    writer = ShardWriter(path)
    try:
        writer.sync()
    finally:
        writer.close()


def sync_directory(path: Path) -> None:
    """Bring a directory's own entries to the disk."""
    with writing(path):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
