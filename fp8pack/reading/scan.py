"""Reading the bytes of tensors in threads: their digests, and what their kind cannot have."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Lock

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from fp8pack.checkpoint.digests import Piece
from fp8pack.checkpoint.source import ShardReader
from fp8pack.checkpoint.whole import Difference
from fp8pack.errors import InputError
from fp8pack.machine import usable_cores
from fp8pack.modelfacts.spec import TensorSpec
from fp8pack.numerics import native
from fp8pack.numerics.formats import E4M3, Float8Format
from fp8pack.numerics.metrics import widen
from fp8pack.packing.workers import Stop, run_threads
from fp8pack.planning.sizes import SIZES

OnProgress = Callable[[int, int], None]
Watch = Callable[[NDArray[np.uint8]], str]  # says what is wrong with bytes of a tensor, if anything is
_STRIP_NBYTES = 1 << 20
FLOATS = ("F32", "BF16", "F16")
EXPONENTS = ("U8", "F8_E8M0")
_NO_EXPONENT = 255


def pieces_of(nbytes: int) -> Iterator[Piece]:
    """Yield a tensor's bytes in pieces of a band."""
    for begin in range(0, nbytes, SIZES.band):
        yield Piece(begin, min(SIZES.band, nbytes - begin))


class Scan:
    """Reads tensors in threads, which digest every piece and look for bytes that its tensor cannot have."""

    def __init__(self, directory: Path, watches: Mapping[str, Watch]) -> None:
        self.digests: dict[tuple[str, int], list[bytes]] = {}
        self._directory, self._watches = directory, watches
        self._problems: dict[str, Difference] = {}
        self._lock, self._done = Lock(), 0

    @property
    def problems(self) -> list[Difference]:
        """What was found in the bytes, by the name of the tensor."""
        return [self._problems[name] for name in sorted(self._problems)]

    def run(self, tensors: Iterable[tuple[TensorSpec, tuple[Piece, ...]]], tell: OnProgress) -> int:
        """Read every piece; return the bytes that were read."""
        files: dict[str, list[tuple[TensorSpec, Piece]]] = {}
        for spec, pieces in sorted(tensors, key=lambda tensor: tensor[0].begin):
            files.setdefault(spec.file, []).extend((spec, piece) for piece in pieces)
        total = sum(piece.nbytes for jobs in files.values() for _, piece in jobs)
        if total:
            run_threads(
                files.values(),
                self._worker,
                count=usable_cores(),
                stop=Stop(),
                tick=lambda: tell(self._done, total),
            )
        tell(self._done, total)
        return self._done

    @contextmanager
    def _worker(self) -> Iterator[Callable[[tuple[TensorSpec, Piece]], None]]:
        readers: dict[str, ShardReader] = {}
        buffer = memoryview(bytearray(_STRIP_NBYTES))

        def work(job: tuple[TensorSpec, Piece]) -> None:
            spec, piece = job
            try:
                if spec.file not in readers:
                    for file in list(readers):
                        readers.pop(file).close()
                    readers[spec.file] = ShardReader(self._directory / spec.file)
                self._read(readers[spec.file], spec, piece, buffer)
            except InputError as error:
                self._problems[spec.name] = Difference(spec.file, str(error), spec.name)
            with self._lock:
                self._done += piece.nbytes

        try:
            yield work
        finally:
            for reader in readers.values():
                reader.close()

    def _read(self, reader: ShardReader, spec: TensorSpec, piece: Piece, buffer: memoryview) -> None:
        begin = spec.begin + piece.begin
        if piece.crops:
            data = np.empty(piece.nbytes, np.uint8)
            reader.readinto(data.data, begin)
            self._watch(spec, data)
            self.digests[spec.name, piece.begin] = piece.digests(data)
            return
        hasher = blake3()
        for at in range(0, piece.nbytes, _STRIP_NBYTES):
            strip = buffer[: piece.nbytes - at]
            reader.readinto(strip, begin + at)
            hasher.update(strip)
            self._watch(spec, np.frombuffer(strip, np.uint8))
        self.digests[spec.name, piece.begin] = [hasher.digest()]

    def _watch(self, spec: TensorSpec, data: NDArray[np.uint8]) -> None:
        watch = self._watches.get(spec.name)
        if watch is not None and (problem := watch(data)):
            self._problems[spec.name] = Difference(spec.file, problem, spec.name)


def problem_of_payload(format: Float8Format, data: NDArray[np.uint8]) -> str:
    """Return what is wrong with bytes of a payload, empty if nothing is."""
    largest = native.largest_codes(data.reshape(1, -1), (1, 1), region=(1, data.size))
    return "the payload has a NaN or infinity" if largest[0, 0] >= format.nan_codes[0] else ""


def watch_of_scales(dtype: str) -> Watch:
    """Return what looks at the scales of a dtype."""
    return _problem_of_exponents if dtype in EXPONENTS else partial(_problem_of_scales, dtype)


def _problem_of_exponents(data: NDArray[np.uint8]) -> str:
    return "a scale is NaN (255)" if (data == _NO_EXPONENT).any() else ""


def _problem_of_scales(dtype: str, data: NDArray[np.uint8]) -> str:
    values = widen(data.view(np.uint32 if dtype == "F32" else np.uint16), dtype)
    if not np.isfinite(values).all():
        return "a scale is NaN or infinite"
    if (values < 0).any():
        return "a scale is negative"
    if (values == 0).any():
        return "a scale is zero"
    with np.errstate(over="ignore"):
        return "" if np.isfinite(values * np.float32(E4M3.max)).all() else "a scale is too large: its values overflow"
