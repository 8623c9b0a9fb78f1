"""Where hidden states lie while an evaluation runs: a temporary folder, or one that the same command continues."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fp8pack.checkpoint.shard_writer import writing
from fp8pack.errors import OutputError


@contextmanager
def working_folder(state: Path | None, key: str) -> Iterator[Path]:
    """Yield a folder; with a state it is kept when the context ends early, and found again by its key.

    Raises:
        OutputError: another process uses it. SpaceError: it cannot be written.
    """
    if state is None:
        with tempfile.TemporaryDirectory(prefix="fp8pack-eval-") as name:
            yield Path(name)
        return
    folder = state / f"eval-{key[:16]}"
    with writing(state):
        folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(
                f"{folder} is used by another process", "wait for it, or choose another --state"
            ) from None
        yield folder
        shutil.rmtree(folder)
    finally:
        os.close(fd)
