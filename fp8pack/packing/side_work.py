"""Side files as work: copied piece by piece, by the threads that work bands."""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from fp8pack.checkpoint.shard_writer import ShardWriter, writing
from fp8pack.checkpoint.side_files import SideFile
from fp8pack.packing.workers import Stop

_PIECE_NBYTES = 1 << 20


@dataclass(slots=True)
class SideWork:
    """A side file while it is copied; `digest` is that of the finished copy, once it is on the disk."""

    side: SideFile
    digest: str = ""

    def copy(self, source: Path, folder: Path, *, stop: Stop, count: Callable[[int], None]) -> str:
        """Copy the file byte for byte; return its digest, empty if it was stopped before the end.

        count: is told the bytes of each piece.
        """
        target, hasher = folder / self.side.name, blake3()
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
        with closing(ShardWriter(target, create=True)) as writer:
            writer.start(b"", self.side.size)
            for offset, data in _pieces(self.side, source):
                if stop.is_set():
                    return ""
                hasher.update(data)
                writer.write(data, offset)
                count(len(data))
        return f"blake3:{hasher.hexdigest()}"


def digest_of(side: SideFile, directory: Path) -> str:
    """Return the digest of a side file of a directory."""
    hasher = blake3()
    for _, data in _pieces(side, directory):
        hasher.update(data)
    return f"blake3:{hasher.hexdigest()}"


def read_side_file(side: SideFile, directory: Path) -> bytes:
    """Return the bytes of a small side file."""
    return b"".join(bytes(data) for _, data in _pieces(side, directory))


def _pieces(side: SideFile, directory: Path) -> Iterator[tuple[int, memoryview]]:
    """Each piece and its offset; the bytes are overwritten by the next."""
    buffer = memoryview(bytearray(min(_PIECE_NBYTES, side.size)))
    with closing(side.open_in(directory)) as reader:
        for offset in range(0, side.size, _PIECE_NBYTES):
            data = buffer[: side.size - offset]
            reader.readinto(data, offset)
            yield offset, data
