"""A thread that touches a lock file, so that other hosts see that its owner is alive."""

import os
from pathlib import Path
from threading import Event, Thread

from fp8pack.checkpoint.shard_writer import writing

BEAT_SECONDS = 10.0


class Heartbeat:
    """Touches an open file again and again until it is stopped, whatever the other threads are busy with."""

    def __init__(self, fd: int, path: Path) -> None:
        self._fd, self._path = fd, path
        self._stopped = Event()
        self._error: OSError | None = None
        self._thread = Thread(target=self._run, name="fp8pack-heartbeat", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise SpaceError if the last beat failed: to other hosts, the owner may seem dead."""
        if self._error is not None:
            with writing(self._path):
                raise self._error

    def stop(self) -> None:
        """Return when the thread has ended."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(BEAT_SECONDS):
            try:
                os.utime(self._fd)
                self._error = None
            except OSError as error:  # of a server that is away for a moment, say: the next beat tries again
                self._error = error
