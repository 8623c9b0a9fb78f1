"""Where an unfinished output lives, who may write it, and the one rename that makes it real.

.<out>.fp8pack-partial/lock            flock, and the owner's host and process
.<out>.fp8pack-partial/journal.jsonl   what is finished
.<out>.fp8pack-partial/output/         becomes <out> by one rename
.<out>.fp8pack-old                     what --overwrite replaces, until the swap is finished
"""

import fcntl
import json
import os
import shutil
import socket
import time
from pathlib import Path
from types import TracebackType

from fp8pack.checkpoint.shard_writer import sync_directory, writing
from fp8pack.errors import OutputError, SpaceError

_STALE_SECONDS = 120.0


class Staging:
    """The staging directory of one output; a context manager that holds its lock."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.folder = output.parent / f".{output.name}.fp8pack-partial"
        self.content = self.folder / "output"
        self.journal = self.folder / "journal.jsonl"
        self.notes: list[str] = []
        self._old = output.parent / f".{output.name}.fp8pack-old"
        self._lock_path = self.folder / "lock"
        self._fd = -1

    def __enter__(self) -> "Staging":
        with writing(self.folder):
            self.folder.mkdir(exist_ok=True)
            self._fd = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            self._lock()
            self._finish_swap()
            if not self.content.exists():
                self.journal.unlink(missing_ok=True)  # a commit was cut off after its rename
                self.content.mkdir()
        except BaseException:
            os.close(self._fd)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release the lock; finished work stays for the next run, a staging directory without any goes."""
        if self.folder.exists():
            os.ftruncate(self._fd, 0)
            if not self._holds_work():
                shutil.rmtree(self.folder)
        os.close(self._fd)

    def beat(self) -> None:
        """Show other hosts that this process is alive."""
        os.utime(self._fd)

    def clear_content(self) -> None:
        """Throw the unfinished work away."""
        shutil.rmtree(self.content)
        self.content.mkdir()

    def commit(self, *, overwrite: bool) -> None:
        """Make the staged directory the output; whoever looks sees the old output or the new one, whole."""
        sync_directory(self.content)
        with writing(self.output):
            if overwrite and self.output.exists():
                self.output.rename(self._old)
            elif self.output.exists():
                raise OutputError(f"{self.output} appeared while it was being made: move it away and run again")
            self.content.rename(self.output)
        sync_directory(self.output.parent)
        self._remove(self._old)
        shutil.rmtree(self.folder)

    def commit_file(self, *, overwrite: bool) -> None:
        """Make the staged single file the output: its manifest first, then the file, whose rename is the commit."""
        sync_directory(self.content)
        if self.output.exists() and not overwrite:
            raise OutputError(f"{self.output} appeared while it was being made: move it away and run again")
        names = sorted((path.name for path in self.content.iterdir()), key=lambda name: name == self.output.name)
        with writing(self.output):
            for name in names:
                (self.content / name).replace(self.output.parent / name)
        sync_directory(self.output.parent)
        shutil.rmtree(self.folder)

    def _holds_work(self) -> bool:
        return self.journal.exists() and self.journal.read_bytes().count(b"\n") > 1

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OutputError(
                f"{self.output} is being written by another fp8pack: wait for it, or choose another -o"
            ) from None
        if not self._lock_path.exists():
            raise OutputError(f"{self.output} was just finished by another fp8pack")
        owner = os.pread(self._fd, 4096, 0)
        host = socket.gethostname()
        if owner:
            self._check_owner(json.loads(owner), host)
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, json.dumps({"host": host, "pid": os.getpid()}).encode(), 0)

    def _check_owner(self, owner: dict[str, object], host: str) -> None:
        """The kernel releases a lock of this host with its process; one of another host tells by its age."""
        age = time.time() - os.fstat(self._fd).st_mtime
        if owner.get("host") == host:
            return
        if age < _STALE_SECONDS:
            raise OutputError(
                f"{self.output} is being written on {owner.get('host')}: wait for it, or choose another -o"
            )
        self.notes.append(f"took over the lock that {owner.get('host')} left {age / 60:.0f} min ago")

    def _finish_swap(self) -> None:
        """Finish or undo an --overwrite that was interrupted between its two renames."""
        if not self._old.exists():
            return
        if self.output.exists():
            self._remove(self._old)
        else:
            self._old.rename(self.output)

    @staticmethod
    def _remove(path: Path) -> None:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def check_output(output: Path, source: Path) -> None:
    """Raise if the output cannot stand where it is asked for: inside the source, on it, or in no directory."""
    resolved, origin = output.absolute(), source.resolve()
    if resolved == origin or resolved.resolve().is_relative_to(origin):
        raise OutputError(f"{output} lies in the source {source}: choose another -o")
    if not output.parent.is_dir():
        raise SpaceError(f"{output.parent} is no directory: make it first, or choose another -o")
    if not os.access(output.parent, os.W_OK | os.X_OK):
        raise SpaceError(f"{output.parent} is not writable: choose another -o")
