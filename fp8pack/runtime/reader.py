"""Filling buffers of a device from files: threads that read, pinned memory, one side stream.

Each thread reads into one of two staging buffers while the other is copied to the device. A file that is not in the
page cache is read with O_DIRECT, if the file system supports it; any other file through the page cache.
"""

import os
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fp8pack.checkpoint.source import ShardReader
from fp8pack.regular_files import FewOpen, open_regular
from fp8pack.runtime.placement import Cut, Read

_PAGE = 4096
_SAMPLES = 16  # pages of a file that are looked up in the page cache
Digests = dict[tuple[str, int], list[bytes]]  # (tensor, offset of the piece in it) -> digests


def read_all(
    directory: Path, reads: Sequence[Read], buffers: Sequence[Tensor], device: torch.device, workers: int
) -> Digests:
    """Carry out reads; return the requested digests.

    Raises:
        InputError: a file is missing, or was truncated during reading.
    """
    if not reads:
        return {}
    waiting: queue.SimpleQueue[Read] = queue.SimpleQueue()
    for read in reads:
        waiting.put(read)
    direct = {file for file in {read.file for read in reads} if device.type == "cuda" and _is_cold(directory / file)}
    largest = max(read.nbytes for read in reads)
    stream = _Stream(device)
    digests: Digests = {}
    stop = threading.Event()

    def work() -> None:
        with _Worker(directory, direct, buffers, stream, largest) as worker:
            while not stop.is_set():
                try:
                    read = waiting.get_nowait()
                except queue.Empty:
                    return
                digests.update(worker.carry_out(read))

    count = min(workers, len(reads))
    with ThreadPoolExecutor(count, "fp8pack-read") as pool:
        futures = [pool.submit(work) for _ in range(count)]
        try:
            for future in as_completed(futures):
                future.result()
        finally:
            stop.set()  # after an error or Ctrl-C the others end after their current read
    stream.finish()
    return digests


class _Worker:
    """The state of a thread: open files, and two staging buffers, used in turn."""

    def __init__(
        self, directory: Path, direct: set[str], buffers: Sequence[Tensor], stream: "_Stream", largest: int
    ) -> None:
        self._directory, self._direct, self._buffers, self._stream = directory, direct, buffers, stream
        self._slots = [_Slot(largest + 2 * _PAGE, stream) for _ in range(2)]
        self._readers: FewOpen[ShardReader | _DirectReader] = FewOpen()

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self._readers.close()
        for slot in self._slots:
            slot.wait()

    def carry_out(self, read: Read) -> Digests:
        """Read, start the copies to the device, and return the digests of what was read."""
        slot = self._slots[0]
        self._slots.reverse()
        slot.wait()
        begin = read.begin % _PAGE  # a direct read needs the same alignment in memory as in the file
        self._open(read.file).readinto(slot.bytes[begin : begin + read.nbytes].data, read.begin)
        data = slot.bytes[begin : begin + read.nbytes]
        digests = {
            (proof.tensor, proof.piece.begin): proof.piece.digests(data[proof.begin :][: proof.piece.nbytes])
            for proof in read.proofs
        }
        for cut in read.cuts:
            nbytes = _compact(data[cut.begin :][: cut.nbytes], cut)
            source = slot.staging[begin + cut.begin :][:nbytes]
            slot.copy(source, self._buffers[cut.place.buffer][cut.place.offset :][:nbytes])
        return digests

    def _open(self, file: str) -> "ShardReader | _DirectReader":
        def open_it(file: str) -> ShardReader | _DirectReader:
            path = self._directory / file
            return _DirectReader(path) if file in self._direct else ShardReader(path)

        return self._readers.get(file, open_it)


class _Slot:
    """A staging buffer, pinned for asynchronous copies to a CUDA device."""

    def __init__(self, nbytes: int, stream: "_Stream") -> None:
        self.staging = torch.empty(nbytes + _PAGE, dtype=torch.uint8, pin_memory=stream.is_cuda)
        self.staging = self.staging[-self.staging.data_ptr() % _PAGE :]
        self.bytes: NDArray[np.uint8] = self.staging.numpy()
        self._stream, self._done = stream, stream.event()

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Start a copy to the device."""
        self._stream.copy(source, target)
        if self._done is not None:
            self._done.record(self._stream.stream)

    def wait(self) -> None:
        """Wait until all copies from this buffer are done."""
        if self._done is not None:
            self._done.synchronize()


class _Stream:
    """The side stream of a CUDA device; on any other device, copies are synchronous."""

    def __init__(self, device: torch.device) -> None:
        self.is_cuda = device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if self.is_cuda else None  # type: ignore[no-untyped-call]
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(device))  # which may still use this memory

    def event(self) -> torch.cuda.Event | None:
        """Return an event of this device."""
        return torch.cuda.Event() if self.is_cuda else None  # type: ignore[no-untyped-call]

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Copy bytes to the device."""
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=self.is_cuda)

    def finish(self) -> None:
        """Wait for every copy."""
        if self.stream is not None:
            self.stream.synchronize()


class _DirectReader:
    """Reads whole pages with O_DIRECT, into memory that is aligned as the file is."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        self._through = ShardReader(path)

    def readinto(self, buffer: memoryview, offset: int) -> None:
        """Fill the buffer, whose address is offset modulo the page; InputError if the file ends before."""
        head = min(-offset % _PAGE, len(buffer))
        end = len(buffer) - (len(buffer) - head) % _PAGE
        at = head
        while at < end and (got := self._read_pages(buffer[at:end], offset + at)):
            at += got
        self._through.readinto(buffer[:head], offset)
        self._through.readinto(buffer[at:], offset + at)

    def _read_pages(self, buffer: memoryview, offset: int) -> int:
        """Read whole pages; return their bytes, 0 if the file system accepted O_DIRECT but refuses the read."""
        try:
            got = os.preadv(self._fd, [buffer], offset)
        except OSError:
            return 0
        return got // _PAGE * _PAGE

    def close(self) -> None:
        """Close the file."""
        self._through.close()
        os.close(self._fd)


def _compact(data: NDArray[np.uint8], cut: Cut) -> int:
    """Move the cropped bytes to the beginning; return their number."""
    if cut.crop is None:
        return data.size
    wanted = cut.crop.of(data).reshape(-1)
    data[: wanted.size] = wanted
    return wanted.size


def _is_cold(path: Path) -> bool:
    """Whether most of a file is not in the page cache, on a file system that supports O_DIRECT."""
    fd = open_regular(path)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # without it, the lookup of a page would read its neighbours
        size, missing, page = os.fstat(fd).st_size, 0, bytearray(_PAGE)
        for i in range(_SAMPLES):
            try:
                os.preadv(fd, [page], size * i // _SAMPLES // _PAGE * _PAGE, os.RWF_NOWAIT)
            except BlockingIOError:
                missing += 1
        if missing <= _SAMPLES // 2:
            return False
        os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT))
        return True
    except OSError:
        return False
    finally:
        os.close(fd)
