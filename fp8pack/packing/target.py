"""Where the bytes of a plan go: files, or nowhere when only their digests are wanted."""

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from fp8pack.checkpoint.shard_writer import ShardWriter, check_shard, sync_file
from fp8pack.planning.layout import ShardPlan


class Writer(Protocol):
    """An open output file."""

    def write(self, data: memoryview, offset: int) -> None:
        """Write bytes at an offset."""
        ...

    def close(self) -> None:
        """Close the file."""
        ...


class Target(Protocol):
    """The output files of a plan, by name."""

    def start(self, file: str, header: bytes, size: int, constants: Iterable[tuple[int, bytes]]) -> None:
        """Make a file of this size, with its header and its small tensors."""
        ...

    def open(self, file: str) -> Writer:
        """Open a file that was made."""
        ...

    def sync(self, file: str) -> None:
        """Return when what was written is on the disk."""
        ...

    def check(self, plan: ShardPlan) -> None:
        """Raise VerificationError unless a finished file is as planned."""
        ...


class Folder:
    """Files in a directory."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def start(self, file: str, header: bytes, size: int, constants: Iterable[tuple[int, bytes]]) -> None:
        """See Target."""
        writer = ShardWriter(self._path / file, create=True)
        try:
            writer.start(header, size)
            for offset, data in constants:
                writer.write(memoryview(data), offset)
        finally:
            writer.close()

    def open(self, file: str) -> Writer:
        """See Target."""
        return ShardWriter(self._path / file)

    def sync(self, file: str) -> None:
        """See Target."""
        sync_file(self._path / file)

    def check(self, plan: ShardPlan) -> None:
        """See Target."""
        check_shard(self._path / plan.file, plan)


class Nowhere:
    """Takes bytes and keeps none."""

    def start(self, file: str, header: bytes, size: int, constants: Iterable[tuple[int, bytes]]) -> None:
        """Do nothing."""

    def open(self, file: str) -> Writer:
        """Return a writer that does nothing."""
        return _NoWriter()

    def sync(self, file: str) -> None:
        """Do nothing."""

    def check(self, plan: ShardPlan) -> None:
        """Do nothing."""


class _NoWriter:
    def write(self, data: memoryview, offset: int) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""
