"""What the amax pass finds: the largest magnitude of every tensor with a tensor-wide scale."""

import math
from threading import Lock

from fp8pack.checkpoint.journal import Record
from fp8pack.packing.bands import Band


class AmaxCollector:
    """Collects amax values of bands into those of tensors, from several threads; NaN marks a NaN or infinity.

    `amax` holds the finished tensors. They go to the journal whenever they make up `checkpoint_nbytes` of source.
    """

    def __init__(self, journal: Record, checkpoint_nbytes: int) -> None:
        self.amax: dict[str, float] = {}
        self._journal, self._checkpoint_nbytes = journal, checkpoint_nbytes
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
            full = self._unwritten_nbytes >= self._checkpoint_nbytes
        if full:
            self.flush()

    def flush(self) -> None:
        """Bring what is finished to the journal, but for tensors that hold a NaN or infinity."""
        with self._lock:
            ready = {name: amax for name, amax in self._unwritten.items() if not math.isnan(amax)}
            self._unwritten, self._unwritten_nbytes = {}, 0
        if ready:
            self._journal.add_amax(ready)
