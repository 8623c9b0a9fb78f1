"""The feedback of the weights that are rounded right now, shared by all threads."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Condition

from fp8pack.numerics.compensation import Feedback, feedback_of
from fp8pack.numerics.second_moments import matrices_of
from fp8pack.planning.calibration import Calibration
from fp8pack.planning.plan import Compensation

_ROOM = 256 << 20  # bytes of several at once; a larger one is made alone


@dataclass(slots=True)
class _Entry:
    nbytes: int
    users: int = 1
    feedback: Feedback | None = None


class Feedbacks:
    """Makes each feedback once for the threads that need it, and keeps it until others need the room."""

    def __init__(self, calibration: Calibration | None) -> None:
        self._calibration = calibration
        self._entries: dict[Compensation, _Entry] = {}
        self._changed = Condition()

    @contextmanager
    def borrow(self, compensation: Compensation) -> Iterator[Feedback]:
        """Give the feedback to a thread for the time of a block; others that would need too much memory wait."""
        entry = self._enter(compensation)
        try:
            if entry.feedback is None:
                entry.feedback = self._make(compensation)
                with self._changed:
                    self._changed.notify_all()
            yield entry.feedback
        finally:
            with self._changed:
                entry.users -= 1
                if entry.feedback is None:
                    del self._entries[compensation]  # it failed: another thread fails by itself
                self._changed.notify_all()

    def _enter(self, compensation: Compensation) -> _Entry:
        """The entry, as one of its users; without a feedback, the caller is to make it."""
        with self._changed:
            while True:
                entry = self._entries.get(compensation)
                if entry is not None and entry.feedback is not None:
                    entry.users += 1
                    return entry
                if entry is None and self._make_room(compensation.nbytes):
                    return self._entries.setdefault(compensation, _Entry(compensation.nbytes))
                self._changed.wait()

    def _make_room(self, nbytes: int) -> bool:
        """Drop what nobody uses, the oldest first, as long as it is too much; say whether there is room."""
        for key, entry in list(self._entries.items()):
            if sum(each.nbytes for each in self._entries.values()) + nbytes <= _ROOM:
                return True
            if not entry.users:
                del self._entries[key]
        return not self._entries or sum(each.nbytes for each in self._entries.values()) + nbytes <= _ROOM

    def _make(self, compensation: Compensation) -> Feedback:
        if self._calibration is None:
            raise ValueError("compensated rounding without a calibration")
        total = None
        for point in compensation.points:
            moments = self._calibration.by_point[point].moments
            if moments is None:
                raise ValueError(f"{point} has no second moments")
            triangles = moments.load()
            total = triangles if total is None else total + triangles
        if total is None:
            raise ValueError("compensated rounding without a point")
        del triangles
        matrices = matrices_of(total, compensation.block)
        del total
        return feedback_of(matrices)
