"""Threads that work bands until none is left, something fails, or somebody asks them to stop."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from threading import Event, Lock, Thread
from typing import TypeVar

T = TypeVar("T")

_TICK_SECONDS = 0.25


@dataclass(slots=True)
class Stop:
    """Why the threads should stop, shared between them: an error of one, or the deadline."""

    event: Event = field(default_factory=Event)
    errors: list[BaseException] = field(default_factory=list)
    deadline: float | None = None
    deadline_passed: bool = False

    def fail(self, error: BaseException) -> None:
        """Record an error and stop everyone."""
        self.errors.append(error)
        self.event.set()

    def check_deadline(self) -> None:
        """Stop everyone once the deadline is over."""
        if self.deadline is not None and time.monotonic() >= self.deadline:
            self.deadline_passed = True
            self.event.set()


def run_threads(jobs: Iterable[T], make_worker: Callable[[], Callable[[T], None]], *, count: int, stop: Stop, tick: Callable[[], None]) -> None:
    """Hand the jobs, in order, to `count` threads, each with a worker of its own; return when all threads ended.

    `tick` is called about four times a second from the calling thread. An exception there (KeyboardInterrupt, say)
    stops the threads after the jobs in their hands and is raised; the first exception of a worker likewise.
    """
    queue, lock, ended = iter(jobs), Lock(), Event()
    running = count

    def work() -> None:
        nonlocal running
        try:
            worker = make_worker()
            while not stop.event.is_set():
                with lock:
                    job = next(queue, None)
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
            stop.check_deadline()
            tick()
    except BaseException:
        stop.event.set()
        for thread in threads:
            thread.join()
        raise
    if stop.errors:
        raise stop.errors[0]
