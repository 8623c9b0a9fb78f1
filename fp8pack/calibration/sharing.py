"""Shared recorders: a tensor that is the input of several modules is recorded once.

Points share a recorder while all their tensors are the same. A tensor is the same if it has the same address and was
not changed since; the last ones are kept alive, so that no other tensor gets their address. A point with another
tensor, or without one, is split off with its own statistics: before each tensor the recorder of a shared site is
copied, and points without that tensor continue with the copy.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from fp8pack.calibration.recorder import Recorder
from fp8pack.modelfacts.roles import layer_of
from fp8pack.planning.calibration import Site

_MAX_OPEN = 4  # tensors that may be the input of another module, as a norm's output of q, k and v


@dataclass(slots=True, eq=False)
class _Seen:
    """A tensor that was just recorded, and its points; `before` is a copy of the recorder without it."""

    value: Tensor
    address: int
    version: int
    block: int | None
    recorder: Recorder
    before: Recorder | None
    points: set[str] = field(default_factory=set)
    has_moments: bool = False

    def take_moments(self, add: Callable[[Recorder], None] | None) -> None:
        """Add the tensor to the second moments once: of its points, those that are inputs need them."""
        if add is not None and not self.has_moments:
            add(self.recorder)
            self.has_moments = True


class Recorders:
    """The recorders of a set of sites, by point."""

    def __init__(self) -> None:
        self._by_point: dict[str, Recorder] = {}
        self._open: list[_Seen] = []
        self._spare: list[Recorder] = []
        self._blocks: dict[str, int | None] = {}

    def __iter__(self) -> Iterator[Recorder]:
        """Yield each recorder once."""
        return iter(dict.fromkeys(self._by_point.values()))

    def restore(self, sites: Iterable[Site]) -> None:
        """Continue from these sites."""
        self._by_point = {}
        for site in sites:
            self._by_point.update(dict.fromkeys(site.points, Recorder.of_site(site)))

    def get(self, points: Sequence[str], channels: int) -> Recorder:
        """Return the recorder of the first point; a new one of all points if it has none."""
        if points[0] not in self._by_point:
            self._by_point.update(dict.fromkeys(points, Recorder(points, channels)))
        return self._by_point[points[0]]

    def see(
        self,
        points: Sequence[str],
        value: Tensor,
        add: Callable[[Recorder], None],
        add_moments: Callable[[Recorder], None] | None = None,
    ) -> None:
        """Record a tensor [..., K] for points; `add` adds it to a recorder, unless it is recorded already.

        add_moments: adds it to the second moments of a recorder, None if these points need none.
        """
        block = self._block(points[0])
        seen = next((seen for seen in self._open if seen.block == block and _is_same(seen, value)), None)
        if seen is not None:
            if points[0] not in self._by_point and seen.recorder.num_tensors == 1:
                self._by_point.update(dict.fromkeys(points, seen.recorder))
                seen.recorder.points.extend(points)
            if self._by_point.get(points[0]) is seen.recorder:
                seen.points.update(points)
                seen.take_moments(add_moments)
                return
        for other in [other for other in self._open if points[0] in other.recorder.points]:
            self._close(other)
        recorder = self.get(points, value.shape[-1])
        before = None
        if len(recorder.points) > len(points):
            before = recorder.copy_to(self._spare.pop() if self._spare else None)
        recorder.num_tensors += 1
        add(recorder)
        version = -1 if value.is_inference() else value._version
        self._open.append(_Seen(value, value.data_ptr(), version, block, recorder, before, set(points)))
        self._open[-1].take_moments(add_moments)
        if len(self._open) > _MAX_OPEN:
            self._close(self._open[0])

    def close(self) -> None:
        """Release all tensors: they are no inputs any more."""
        while self._open:
            self._close(self._open[0])

    def _close(self, seen: _Seen) -> None:
        self._open.remove(seen)
        if seen.before is None:
            return
        if missed := [point for point in seen.recorder.points if point not in seen.points]:
            apart = seen.before.copy_to(None)
            apart.points = missed
            seen.recorder.points = [point for point in seen.recorder.points if point in seen.points]
            self._by_point.update(dict.fromkeys(missed, apart))
        self._spare.append(seen.before)

    def _block(self, point: str) -> int | None:
        """The layer of a point: sites are shared only within a layer, since a streamed run has one at a time."""
        if point not in self._blocks:
            self._blocks[point] = layer_of(f"{point}.")
        return self._blocks[point]


def _is_same(seen: _Seen, value: Tensor) -> bool:
    """Whether a tensor is a recorded one, unchanged; its shape may differ.

    Inference tensors have no version that would show a change, so they are never the same.
    """
    known = seen.value
    if seen.address != value.data_ptr() or value.is_inference():
        return False
    return (
        seen.version == value._version
        and (known.dtype, known.numel(), known.shape[-1]) == (value.dtype, value.numel(), value.shape[-1])
        and known.is_contiguous()
        and value.is_contiguous()
    )
