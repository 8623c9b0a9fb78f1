"""Where an unfinished output lives, who may write it, and the one rename that makes it real.

.<out>.fp8pack-partial/lock            flock, and the owner's host and process
.<out>.fp8pack-partial/journal.jsonl   what is finished
.<out>.fp8pack-partial/output/         becomes <out> by one rename
.<out>.fp8pack-old                     what --overwrite replaces, where it cannot be exchanged in one step
.<out>.fp8pack-trash                   a staging directory that is being removed

The staging directory belongs to this user, nobody else can look into it, and nothing in it is a link: what others put
there in advance is refused, not written through.
"""

import fcntl
import json
import os
import shutil
import socket
import stat
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from fp8pack.checkpoint.exchange import exchange
from fp8pack.checkpoint.heartbeat import Heartbeat
from fp8pack.checkpoint.manifest import MANIFEST_NAME
from fp8pack.checkpoint.shard_writer import sync_directory, writing
from fp8pack.errors import OutputError, SpaceError

_ANOTHER = "choose another -o"
_STALE_SECONDS = 120.0
_MAX_NAME_NBYTES = 255


class Staging:
    """The staging directory of one output; a context manager that holds its lock."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.folder = output.parent / f".{output.name}.fp8pack-partial"
        self.content = self.folder / "output"
        self.journal = self.folder / "journal.jsonl"
        self.notes: list[str] = []
        self._old = output.parent / f".{output.name}.fp8pack-old"
        self._trash = output.parent / f".{output.name}.fp8pack-trash"
        self._lock_path = self.folder / "lock"
        self._fd = -1
        self._heart: Heartbeat | None = None

    @property
    def leftovers(self) -> bool:
        """Whether an earlier run left anything beside the output."""
        return any(path.exists() for path in (self.folder, self._old, self._trash))

    def __enter__(self) -> "Staging":
        with writing(self.folder):
            self._fd = self._take_lock()
            try:
                self._check_folder()
                self._own_lock()
                self._heart = Heartbeat(self._fd, self._lock_path)
                self._finish_swap()
                if not self.content.exists():
                    self.journal.unlink(missing_ok=True)  # a commit was cut off after its rename
                    self.content.mkdir()
            except BaseException:
                self._release()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release the lock; finished work stays for the next run, a staging directory without any goes."""
        with suppress(OSError):  # what is left behind, the next run tidies up
            if self.folder.exists():
                os.ftruncate(self._fd, 0)
                if not self.journal.exists() or self.journal.read_bytes().count(b"\n") <= 1:
                    self.discard()
        self._release()

    def check_free(self) -> None:
        """Raise OutputError if another process is writing the output; nothing is made or taken."""
        try:
            fd = os.open(self._lock_path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            return
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._in_use() from None
        finally:
            os.close(fd)

    def _in_use(self) -> OutputError:
        return OutputError(f"{self.output} is being written by another fp8pack", "wait for it, or choose another -o")

    def clear_content(self) -> None:
        """Throw the unfinished work away."""
        with writing(self.folder):
            shutil.rmtree(self.content)
            self.content.mkdir()

    def keep_only(self, names: Collection[str]) -> None:
        """Remove from the staged output all files, and folders without any, that are not named, relative to it."""
        with writing(self.content):
            for path in sorted(self.content.rglob("*"), reverse=True):  # what a folder holds comes before it
                if path.is_dir() and not path.is_symlink():
                    if not any(path.iterdir()):
                        path.rmdir()
                elif path.relative_to(self.content).as_posix() not in names:
                    path.unlink()

    def discard(self) -> None:
        """Remove the staging directory; by a rename first, so that a newcomer finds all of it or nothing."""
        self.folder.rename(self._trash)
        shutil.rmtree(self._trash, ignore_errors=True)

    def commit(self, *, overwrite: bool) -> None:
        """Make the staged directory the output by one rename, which exchanges it with an old output.

        What fails after that is a note: the output is complete.
        """
        self._check_heart()
        with writing(self.output):
            for folder in (path for path in self.content.rglob("*") if path.is_dir()):
                sync_directory(folder)
            sync_directory(self.content)
            if not self.output.exists():
                self.content.rename(self.output)
            elif overwrite:
                self._replace()
            else:
                raise OutputError(
                    f"{self.output} was created by somebody else in the meantime", "move it away and run again"
                )
        self._tidy_up()

    def _replace(self) -> None:
        """Put the staged directory in the place of the output; where they cannot be exchanged, by two renames.

        A run that is cut off between those is finished by the next. The journal goes first: it does not fit what lies
        in the staging directory afterwards.
        """
        self.journal.unlink(missing_ok=True)
        sync_directory(self.folder)
        if exchange(self.content, self.output):
            return
        self.output.rename(self._old)
        try:
            self.content.rename(self.output)
        except OSError:
            self._old.rename(self.output)
            raise

    def _tidy_up(self) -> None:
        """Sync the commit and remove what is left; an error is a note."""
        try:
            sync_directory(self.output.parent)
            _remove(self._old)
            self.discard()
        except (OSError, SpaceError) as error:
            reason = str(error.strerror).lower() if isinstance(error, OSError) else str(error)
            self.notes.append(f"{self.output} is complete, but what was left could not be removed: {reason}")

    def commit_file(self, *, overwrite: bool) -> None:
        """Make the staged single file the output: its manifest first, then the file, whose rename is the commit."""
        self._check_heart()
        if self.output.exists() and not overwrite:
            raise OutputError(
                f"{self.output} was created by somebody else in the meantime", "move it away and run again"
            )
        names = sorted((path.name for path in self.content.iterdir()), key=lambda name: name == self.output.name)
        with writing(self.output):
            sync_directory(self.content)
            for name in names:
                (self.content / name).replace(self.output.parent / name)
        self._tidy_up()

    def _check_heart(self) -> None:
        """Raise SpaceError if other hosts may believe that this process is dead."""
        if self._heart is not None:
            self._heart.check()

    def _release(self) -> None:
        if self._heart is not None:
            self._heart.stop()
        os.close(self._fd)

    def _take_lock(self) -> int:
        """Open and lock the lock file; again, when the process that held it removes the directory meanwhile."""
        while True:
            self._make_folder()
            if self.folder.is_symlink() or self._lock_path.is_symlink():
                raise self._planted(self._lock_path if self._lock_path.is_symlink() else self.folder)
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            try:
                fd = os.open(self._lock_path, flags, 0o666)
            except FileNotFoundError:
                continue
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._lock_path.stat().st_ino == os.fstat(fd).st_ino:
                    return fd
            except BlockingIOError:
                os.close(fd)
                raise self._in_use() from None
            except FileNotFoundError:
                pass
            os.close(fd)

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(mode=0o700, exist_ok=True)
        except FileExistsError:
            raise self._planted(self.folder) from None
        except OSError as error:
            raise SpaceError(f"{self.output} cannot be created: {str(error.strerror).lower()}", _ANOTHER) from None

    def _check_folder(self) -> None:
        """Raise OutputError if the directory is another user's, or holds anything but files and directories.

        Its owner is compared with that of a new file, since some file systems have owners of their own.
        """
        probe = self.folder / f"probe.{os.getpid()}"
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
        owner = probe.stat().st_uid
        probe.unlink()
        if self.folder.stat().st_uid != owner:
            raise OutputError(f"{self.folder} belongs to another user", _ANOTHER)
        with suppress(OSError):  # a file system without modes
            self.folder.chmod(0o700)
        for path in self.folder.rglob("*"):
            if stat.S_IFMT(path.lstat().st_mode) not in (stat.S_IFREG, stat.S_IFDIR):
                raise self._planted(path)

    def _planted(self, path: Path) -> OutputError:
        return OutputError(f"{path} is a link, or no file or directory of fp8pack", f"remove it, or {_ANOTHER}")

    def _own_lock(self) -> None:
        """The kernel releases a lock of this host with its process; one of another host tells by its age."""
        host = socket.gethostname()
        owner = _parse_owner(os.pread(self._fd, 4096, 0))
        age = time.time() - os.fstat(self._fd).st_mtime
        if owner and owner != host:
            if age < _STALE_SECONDS:
                remedy = f"wait for it, or choose another -o; if it has ended, remove {self._lock_path}"
                raise OutputError(f"{self.output} is being written on {owner}", remedy)
            self.notes.append(f"took over the lock that {owner} left {age / 60:.0f} min ago")
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, json.dumps({"host": host, "pid": os.getpid()}).encode(), 0)

    def _finish_swap(self) -> None:
        """Finish or undo an --overwrite that was interrupted between its two renames."""
        shutil.rmtree(self._trash, ignore_errors=True)
        if self._old.is_symlink() or (self._old.exists() and not _is_replaceable(self._old)):
            raise self._planted(self._old)
        if self._old.exists() and self.output.exists():
            _remove(self._old)
        elif self._old.exists():
            self._old.rename(self.output)


def check_output(output: Path, source: Path | None, *, overwrite: bool) -> None:
    """Raise if the output cannot stand where it is asked for; without a source it cannot be in the way of one.

    Raises:
        OutputError: it would lie in the source or hold it, is a link, has too long a name, or is to be replaced
            although it is no checkpoint.
        SpaceError: its directory does not exist or is not writable.
    """
    try:
        _check_place(output, source, overwrite=overwrite)
    except (OSError, RuntimeError) as error:  # a link to itself is a RuntimeError before Python 3.13
        reason = str(error.strerror).lower() if isinstance(error, OSError) else "a link on the way leads to itself"
        raise SpaceError(f"{output} cannot be read: {reason}", _ANOTHER) from None


def _check_place(output: Path, source: Path | None, *, overwrite: bool) -> None:
    if len(os.fsencode(output.name)) + len("..fp8pack-partial") > _MAX_NAME_NBYTES:
        raise OutputError(f"the name {output.name[:40]}… is too long for a file system", _ANOTHER)
    if output.is_symlink():
        raise OutputError(f"{output} is a link", "use its target, or choose another -o")
    place, origin = output.absolute().resolve(), source.resolve() if source else None
    if origin and place.is_relative_to(origin):
        raise OutputError(f"{output} is inside the source {source}", _ANOTHER)
    if origin and origin.is_relative_to(place):
        raise OutputError(f"{output} contains the source {source}", _ANOTHER)
    if place == Path.cwd().resolve():
        raise OutputError("the output is the current directory", _ANOTHER)
    if overwrite and output.exists() and not _is_replaceable(output):
        raise OutputError(
            f"{output} is not a checkpoint, so it is not overwritten", "move it away first, or choose another -o"
        )
    if not output.parent.is_dir():
        raise SpaceError(f"{output.parent} is not a directory", "make it first, or choose another -o")
    if not os.access(output.parent, os.R_OK | os.W_OK | os.X_OK):
        raise SpaceError(f"{output.parent} is not writable", _ANOTHER)


def check_output_file(output: Path, source: Path | None, *, overwrite: bool) -> None:
    """Raise as `check_output` does, and if a file is asked for where a directory is."""
    check_output(output, source, overwrite=overwrite)
    if output.is_dir():
        raise OutputError(f"{output} is a directory", _ANOTHER)


def _is_replaceable(output: Path) -> bool:
    """Whether it is a weights file, or a directory that is empty or holds one: nothing else is meant."""
    if not output.is_dir():
        return output.suffix == ".safetensors"
    names = [path.name for path in output.iterdir()]
    return not names or any(name == MANIFEST_NAME or name.endswith(".safetensors") for name in names)


def _parse_owner(text: bytes) -> str:
    """The host that a lock file names; empty where it names none, as after a power loss."""
    try:
        owner = json.loads(text)
    except ValueError:
        return ""
    return str(owner.get("host", "")) if isinstance(owner, dict) else ""


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
