"""What the amax pass finds: the largest magnitude of every tensor with a tensor-wide scale."""

import math
from threading import Lock

from fp8pack.checkpoint.journal import Journal
from fp8pack.packing.bands import Band

CHECKPOINT_NBYTES = 1 << 30  # of source, between two lines of the journal


class AmaxCollector:
    """Collects amax values of bands into those of tensors, from several threads; NaN marks a NaN or infinity.

    `amax` holds the finished tensors. What is finished goes to the journal on the way.
    """

    def __init__(self, journal: Journal) -> None:
        self.amax: dict[str, float] = {}
        self._journal = journal
        self._partial: dict[str, list[float]] = {}
        self._unwritten: dict[str, float] = {}
        self._unwritten_nbytes = 0
        self._lock = Lock()

    def add(self, band: Band, amax: float) -> None:
        """Record the amax of a band."""
        name = band.tensor.spec.name
        with self._lock:
            values = self._partial.setdefault(name, [])
            values.append(amax)
            if len(values) < band.tensor.num_bands:
                return
            self.amax[name] = math.nan if any(map(math.isnan, values)) else max(values)
            del self._partial[name]
            self._unwritten[name] = self.amax[name]
            self._unwritten_nbytes += band.tensor.spec.nbytes
            full = self._unwritten_nbytes >= CHECKPOINT_NBYTES
        if full:
            self.flush()

    def flush(self) -> None:
        """Bring what is finished to the journal, but for tensors that hold a NaN or infinity."""
        with self._lock:
            ready = {name: amax for name, amax in self._unwritten.items() if not math.isnan(amax)}
            self._unwritten, self._unwritten_nbytes = {}, 0
        if ready:
            self._journal.add_amax(ready)
