"""Where the bytes of a loaded checkpoint lie: in mapped files on a CPU, in buffers on any other device."""

import math
import mmap
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from fp8pack.checkpoint.source import open_regular
from fp8pack.errors import InputError
from fp8pack.numerics.torch_dtypes import TORCH_DTYPES
from fp8pack.planning.spec import TensorSpec
from fp8pack.planning.tensor_parallel import Part
from fp8pack.runtime.placement import Place


class Memory(Protocol):
    """Tensors by their specs."""

    def tensor(self, spec: TensorSpec) -> Tensor:
        """Return a tensor, or the part of it that was loaded."""
        ...


class MappedFiles:
    """Files that are mapped privately when a tensor of theirs is first asked for: a view, or of cut rows a copy."""

    def __init__(self, directory: Path, parts: Mapping[str, Part]) -> None:
        self._directory, self._parts = directory, parts
        self._files: dict[str, Tensor] = {}

    def tensor(self, spec: TensorSpec) -> Tensor:
        """Return a tensor, or the part of it that this rank holds; a view unless it is misaligned, or many spans."""
        if spec.file not in self._files:
            self._files[spec.file] = _map(self._directory / spec.file)
        whole = _shaped(self._files[spec.file][spec.begin : spec.end], spec, spec.shape)
        part = self._parts.get(spec.name)
        if part is None:
            return whole
        spans = [whole[lo:hi] for lo, hi in part.rows]
        rows = spans[0] if len(spans) == 1 else torch.cat(spans)
        return rows if whole.ndim == 1 else rows[:, slice(*part.cols)]


class Shapes:
    """Tensors of the meta device: dtypes and shapes alone."""

    def __init__(self, parts: Mapping[str, Part]) -> None:
        self._parts = parts

    def tensor(self, spec: TensorSpec) -> Tensor:
        """Return a tensor without data, or the part of it that this rank holds."""
        return torch.empty(_shape(spec, self._parts.get(spec.name)), dtype=_dtype(spec), device="meta")


class Buffers:
    """Buffers of a device, each with the bytes of tensors that follow each other in a file."""

    def __init__(self, buffers: Sequence[Tensor], places: Mapping[str, Place], parts: Mapping[str, Part]) -> None:
        self._buffers, self._places, self._parts = buffers, places, parts

    def tensor(self, spec: TensorSpec) -> Tensor:
        """Return a tensor, or the part of it that this rank holds: a view."""
        place, shape = self._places[spec.name], _shape(spec, self._parts.get(spec.name))
        nbytes = math.prod(shape) * _dtype(spec).itemsize
        return _shaped(self._buffers[place.buffer][place.offset :][:nbytes], spec, shape)


def _shaped(data: Tensor, spec: TensorSpec, shape: tuple[int, ...]) -> Tensor:
    dtype = _dtype(spec)
    if not math.prod(shape):
        return torch.empty(shape, dtype=dtype, device=data.device)
    aligned = data if data.storage_offset() % dtype.itemsize == 0 else data.clone()
    return aligned.view(dtype).view(shape)


def _shape(spec: TensorSpec, part: Part | None) -> tuple[int, ...]:
    return spec.shape if part is None else part.shape[: len(spec.shape)]


def _dtype(spec: TensorSpec) -> torch.dtype:
    if spec.dtype not in TORCH_DTYPES:
        raise InputError(f"{spec.file}: tensor {spec.name!r} is {spec.dtype}, which torch has no type for")
    return TORCH_DTYPES[spec.dtype]


def _map(path: Path) -> Tensor:
    fd = open_regular(path)
    try:
        mapped = mmap.mmap(fd, 0, access=mmap.ACCESS_COPY)
    finally:
        os.close(fd)
    return torch.frombuffer(mapped, dtype=torch.uint8)
