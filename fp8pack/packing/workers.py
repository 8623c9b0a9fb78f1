"""Threads that work bands until none is left, something fails, or somebody asks them to stop."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from threading import Event, Lock, Thread
from typing import Generic, TypeVar

T = TypeVar("T")

_TICK_SECONDS = 0.25


@dataclass(slots=True)
class Stop:
    """Why the threads should stop, shared between them: an error of one, or the deadline."""

    event: Event = field(default_factory=Event)
    errors: list[BaseException] = field(default_factory=list)
    deadline: float | None = None

    def fail(self, error: BaseException) -> None:
        """Record an error and stop everyone."""
        self.errors.append(error)
        self.event.set()

    def is_set(self) -> bool:
        """Say whether to stop; the deadline, once it is over, stops everyone."""
        if self.deadline is not None and time.monotonic() >= self.deadline:
            self.event.set()
        return self.event.is_set()


class _Queue(Generic[T]):
    """Hands out the jobs of several streams; a thread stays in its stream, and helps in another only at the end."""

    def __init__(self, streams: Iterable[Iterable[T]]) -> None:
        self._waiting = (iter(stream) for stream in streams)
        self._started: list[Iterator[T]] = []
        self._lock = Lock()

    def take(self, current: Iterator[T] | None) -> tuple[Iterator[T] | None, T | None]:
        """Return a job and the stream it is from, None when all are given out."""
        with self._lock:
            if current is not None and (job := next(current, None)) is not None:
                return current, job
            for stream in self._waiting:
                if (job := next(stream, None)) is not None:
                    self._started.append(stream)
                    return stream, job
            for stream in self._started:
                if (job := next(stream, None)) is not None:
                    return stream, job
            return None, None


def run_threads(
    streams: Iterable[Iterable[T]],
    make_worker: Callable[[], AbstractContextManager[Callable[[T], None]]],
    *,
    count: int,
    stop: Stop,
    tick: Callable[[], None],
) -> None:
    """Work the jobs of several streams with `count` threads, each with a worker of its own.

    A stream is a file: threads in one file would wait for each other, as the kernel lets one at a time write.
    `tick` is called about four times a second from the calling thread. An exception there (KeyboardInterrupt, say)
    stops the threads after the jobs in their hands and is raised; the first exception of a worker likewise.
    """
    queue, lock, ended = _Queue(streams), Lock(), Event()
    running = count

    def work() -> None:
        nonlocal running
        try:
            stream = None
            with make_worker() as worker:
                while not stop.is_set():
                    stream, job = queue.take(stream)
                    if job is None:
                        break
                    worker(job)
        except BaseException as error:
            stop.fail(error)
        with lock:
            running -= 1
            if running == 0:
                ended.set()

    threads = [Thread(target=work, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        while not ended.wait(_TICK_SECONDS):
            tick()
    except BaseException:
        stop.event.set()
        for thread in threads:
            thread.join()
        raise
    if stop.errors:
        raise stop.errors[0]
