"""The memory of a loaded checkpoint: mapped files on a CPU, buffers on any other device."""

import mmap
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from fp8pack.errors import InputError
from fp8pack.modelfacts.spec import TensorSpec
from fp8pack.modelfacts.tensor_parallel import Part
from fp8pack.numerics.torch_dtypes import TORCH_DTYPES
from fp8pack.regular_files import open_regular
from fp8pack.runtime.placement import BufferPlace


class Memory(Protocol):
    """Tensors by their specs."""

    def tensor(self, spec: TensorSpec) -> Tensor:
        """Return a tensor, or the part of it that was loaded."""
        ...

    def release(self) -> None:
        """Give back memory that can be read again."""
        ...


class MappedFiles:
    """Files, mapped privately when one of their tensors is first requested: a view, or a copy if rows are cut out."""

    def __init__(self, directory: Path, parts: Mapping[str, Part]) -> None:
        self._directory, self._parts = directory, parts
        self._files: dict[str, _Bytes] = {}
        self._maps: list[mmap.mmap] = []

    def tensor(self, spec: TensorSpec) -> Tensor:
        """Return a tensor, or this rank's part of it; a copy if it is misaligned or consists of several spans."""
        if spec.file not in self._files:
            self._maps.append(_map(self._directory / spec.file))
            self._files[spec.file] = _Bytes(torch.frombuffer(self._maps[-1], dtype=torch.uint8))
        whole = self._files[spec.file].tensor(spec.begin, spec, spec.shape)
        part = self._parts.get(spec.name)
        if part is None:
            return whole
        spans = [whole[lo:hi] for lo, hi in part.rows]
        rows = spans[0] if len(spans) == 1 else torch.cat(spans)
        return rows if whole.ndim == 1 else rows[:, slice(*part.cols)]

    def release(self) -> None:
        """Give back the pages that were read; what was written into a tensor is lost."""
        for mapped in self._maps:
            mapped.madvise(mmap.MADV_DONTNEED)


class Shapes:
    """Tensors of the meta device: only dtypes and shapes."""

    def __init__(self, parts: Mapping[str, Part]) -> None:
        self._parts = parts

    def tensor(self, spec: TensorSpec) -> Tensor:
        """Return a tensor without data, or this rank's part of it."""
        return torch.empty(_shape(spec, self._parts.get(spec.name)), dtype=_dtype(spec), device="meta")

    def release(self) -> None:
        """Do nothing."""


class Buffers:
    """Buffers of a device, each with the bytes of tensors that are adjacent in a file."""

    def __init__(self, buffers: Sequence[Tensor], places: Mapping[str, BufferPlace], parts: Mapping[str, Part]) -> None:
        self._buffers, self._places, self._parts = [_Bytes(buffer) for buffer in buffers], places, parts

    def tensor(self, spec: TensorSpec) -> Tensor:
        """Return a tensor, or this rank's part of it: a view."""
        place = self._places[spec.name]
        return self._buffers[place.buffer].tensor(place.offset, spec, _shape(spec, self._parts.get(spec.name)))

    def release(self) -> None:
        """Do nothing: buffers are the only copy."""


class _Bytes:
    """A buffer, with a view of all of it per dtype, so that a tensor needs one call into torch."""

    def __init__(self, data: Tensor) -> None:
        self._data = data
        self._views: dict[torch.dtype, Tensor] = {}

    def tensor(self, offset: int, spec: TensorSpec, shape: tuple[int, ...]) -> Tensor:
        """Return the tensor at an offset; a copy if it is misaligned."""
        dtype = _dtype(spec)
        count, strides = 1, [1] * len(shape)
        for axis in range(len(shape) - 1, -1, -1):
            strides[axis] = count
            count *= shape[axis]
        if not count:
            return torch.empty(shape, dtype=dtype, device=self._data.device)
        if offset % dtype.itemsize:
            return self._data[offset : offset + count * dtype.itemsize].clone().view(dtype).view(shape)
        if dtype not in self._views:
            whole = self._data.numel() // dtype.itemsize * dtype.itemsize
            self._views[dtype] = self._data[:whole].view(dtype)
        return self._views[dtype].as_strided(shape, strides, offset // dtype.itemsize)


def _shape(spec: TensorSpec, part: Part | None) -> tuple[int, ...]:
    return spec.shape if part is None else part.shape[: len(spec.shape)]


def _dtype(spec: TensorSpec) -> torch.dtype:
    if spec.dtype not in TORCH_DTYPES:
        raise InputError(f"{spec.file}: tensor {spec.name!r} is {spec.dtype}, a dtype that torch does not have")
    return TORCH_DTYPES[spec.dtype]


def _map(path: Path) -> mmap.mmap:
    fd = open_regular(path)
    try:
        return mmap.mmap(fd, 0, access=mmap.ACCESS_COPY)
    finally:
        os.close(fd)
