"""The journal of an unfinished pack: its fsynced lines are the only truth about finished work.

Line 1    {"journal": 1, "source": fingerprint, "recipe": {...}}
then      {"amax": {tensor: amax}}                                   a finished part of the amax pass
          {"shard": file, "plan": digest, "bands": [[...], ...]}     bands whose bytes are on the disk
          {"done": file, "plan": digest}                             a shard that was synced and cross-checked
          {"side": file, "of": [...], "digest": digest}              a side file whose copy is on the disk
A line counts once its newline is on the disk; what follows the last newline is cut off.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

from fp8pack.checkpoint.shard_writer import writing
from fp8pack.errors import InputError, OutputError
from fp8pack.regular_files import open_regular

_VERSION = 2
_MAX_HEAD_NBYTES = 1 << 24


@dataclass(frozen=True, slots=True)
class BandResult:
    """A finished band: BLAKE3 of its payload and of its scales, amax, the energies of a sample of its rows.

    A copied band has no scales and no amax. Energies are float64 sums over the first 8 rows of the band; those of
    outputs, on the inputs of a calibration, are of compensated rounding alone.
    """

    tensor: str
    index: int
    digest: bytes
    scale_digest: bytes = b""
    amax: float = 0.0
    signal: float = 0.0
    noise: float = 0.0
    output_signal: float = 0.0
    output_noise: float = 0.0

    def as_row(self) -> list[Any]:
        """Return the result as it stands in the journal."""
        digests = [self.digest.hex(), self.scale_digest.hex()]
        energies = [self.signal, self.noise, self.output_signal, self.output_noise]
        return [self.tensor, self.index, *digests, self.amax, *energies]


@dataclass(slots=True)
class Progress:
    """What is finished: amax values, and for each (file, plan digest) its bands and whether it is done.

    sides: the digest of each copied side file, by its name and the version of it that was copied.
    """

    amax: dict[str, float] = field(default_factory=dict)
    bands: dict[tuple[str, str], list[BandResult]] = field(default_factory=dict)
    done: set[tuple[str, str]] = field(default_factory=set)
    sides: dict[tuple[str, tuple[int, ...]], str] = field(default_factory=dict)


class Record(Protocol):
    """What is told which work is finished."""

    def add_amax(self, amax: dict[str, float]) -> None:
        """Record finished tensors of the amax pass."""
        ...

    def add_bands(self, file: str, plan: str, results: Iterable[BandResult]) -> None:
        """Record bands; their bytes must be on the disk already."""
        ...

    def add_done(self, file: str, plan: str) -> None:
        """Record a finished shard."""
        ...

    def add_side(self, file: str, version: tuple[int, ...], digest: str) -> None:
        """Record a copied side file; its bytes must be on the disk already."""
        ...


class NoRecord:
    """Keeps nothing, of work that is not continued."""

    def add_amax(self, amax: dict[str, float]) -> None:
        """Do nothing."""

    def add_bands(self, file: str, plan: str, results: Iterable[BandResult]) -> None:
        """Do nothing."""

    def add_done(self, file: str, plan: str) -> None:
        """Do nothing."""

    def add_side(self, file: str, version: tuple[int, ...], digest: str) -> None:
        """Do nothing."""


class Journal:
    """An append-only file; each line is on the disk when `append` returns."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = Lock()
        with writing(path):
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)

    def read(self) -> tuple[dict[str, Any], Progress]:
        """Return whose work the journal holds (see `start`) and what is finished; cut off a torn line.

        Raises:
            OutputError: a whole line is damaged.
        """
        data = os.pread(self._fd, os.fstat(self._fd).st_size, 0)
        kept = data[: data.rfind(b"\n") + 1]
        if len(kept) != len(data):
            with writing(self._path):
                os.ftruncate(self._fd, len(kept))
        progress = Progress()
        try:
            lines = [json.loads(line) for line in kept.splitlines()]
            for line in lines[1:]:
                _replay(progress, line)
            return _parse_head(lines[0]) if lines else {}, progress
        except (ValueError, TypeError, RecursionError):
            raise OutputError(f"{self._path} is damaged", "--no-resume discards the unfinished work") from None

    def start(self, source: str, recipe: dict[str, Any]) -> None:
        """Begin anew: for a source with this fingerprint, packed in this way."""
        with writing(self._path):
            os.ftruncate(self._fd, 0)
        self._append({"journal": _VERSION, "source": source, "recipe": recipe})

    def add_amax(self, amax: dict[str, float]) -> None:
        """Record finished tensors of the amax pass."""
        self._append({"amax": amax})

    def add_bands(self, file: str, plan: str, results: Iterable[BandResult]) -> None:
        """Record bands; their bytes must be on the disk already."""
        self._append({"shard": file, "plan": plan, "bands": [result.as_row() for result in results]})

    def add_done(self, file: str, plan: str) -> None:
        """Record a finished shard."""
        self._append({"done": file, "plan": plan})

    def add_side(self, file: str, version: tuple[int, ...], digest: str) -> None:
        """Record a copied side file; its bytes must be on the disk already."""
        self._append({"side": file, "of": version, "digest": digest})

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def _append(self, line: dict[str, Any]) -> None:
        data = memoryview(json.dumps(line, separators=(",", ":")).encode() + b"\n")
        with self._lock, writing(self._path):
            end = os.fstat(self._fd).st_size
            try:
                while data:
                    data = data[os.write(self._fd, data) :]
                os.fdatasync(self._fd)
            except OSError:
                os.ftruncate(self._fd, end)  # or the next line would be glued to what was written of this one
                raise


def read_head(path: Path) -> dict[str, Any]:
    """Return whose work a journal holds, empty if it says nothing; only `source` and `recipe` matter."""
    try:
        with os.fdopen(open_regular(path), "rb") as opened:
            return _parse_head(json.loads(opened.readline(_MAX_HEAD_NBYTES)))
    except (OSError, ValueError, RecursionError, InputError):
        return {}


def _parse_head(line: Any) -> dict[str, Any]:
    match line:
        case {"journal": version, "source": str(), "recipe": dict()} if version == _VERSION:
            return dict(line)
    raise ValueError("not the head of a journal")


def _replay(progress: Progress, line: Any) -> None:
    match line:
        case {"amax": dict(values)}:
            progress.amax.update({str(name): float(value) for name, value in values.items()})
        case {"shard": str(file), "plan": str(plan), "bands": list(rows)}:
            progress.bands.setdefault((file, plan), []).extend(_parse_row(row) for row in rows)
        case {"done": str(file), "plan": str(plan)}:
            progress.done.add((file, plan))
        case {"side": str(file), "of": [int(), int(), int()] as version, "digest": str(digest)}:
            progress.sides[file, tuple(version)] = digest
        case _:
            raise ValueError("not a line of a journal")


def _parse_row(row: Any) -> BandResult:
    match row:
        case [str(name), int(index), str(digest), str(of_scale), *numbers] if _are_numbers(numbers, 5):
            return BandResult(name, index, bytes.fromhex(digest), bytes.fromhex(of_scale), *numbers)
    raise ValueError("not a band")


def _are_numbers(values: list[Any], count: int) -> bool:
    return len(values) == count and all(type(value) in (int, float) for value in values)
