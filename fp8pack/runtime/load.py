"""`load_packed`: an FP8 checkpoint of any convention as a mapping from names to tensors on a device, first form.

On a CPU the tensors are views of the mapped files: nothing is copied, and a page is read when it is first used. On
another device each shard is one buffer, and the tensors are views of it. What is fused by engines lies side by side
in the file, so a fused weight is a view, too.
"""

import math
import mmap
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fp8pack.checkpoint.manifest_schema import Manifest, PackedEntry, check_headers
from fp8pack.checkpoint.quantized import read_contents
from fp8pack.checkpoint.source import open_checkpoint, open_regular
from fp8pack.errors import InputError
from fp8pack.numerics.swizzle import TILE
from fp8pack.planning.contents import Contents
from fp8pack.planning.policy import is_part_of, storage_key
from fp8pack.planning.spec import TensorSpec
from fp8pack.runtime.packed_tensor import PackedTensor

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}


def load_packed(path: str | Path, device: str | torch.device = "cpu") -> "PackedCheckpoint":
    """Load an FP8 checkpoint of any convention: a directory, a single `.safetensors` file, or a cached repository.

    Raises:
        InputError: a file is malformed or not what the manifest says, or an FP8 weight has no scale that fits it.
    """
    source = open_checkpoint(Path(path))
    contents = read_contents(source)
    manifest = source.manifest
    if not contents.quantized and manifest is None:
        raise InputError(f"{source.path} holds no FP8 weight: pack it with `fp8pack pack`")
    if manifest is not None:
        check_headers(source.specs, manifest)
    files = {file.name: _map(source.directory / file.name, torch.device(device)) for file in source.files}
    return PackedCheckpoint(contents, files, manifest, source.config or {})


class PackedCheckpoint(Mapping[str, PackedTensor | Tensor]):
    """A packed checkpoint on a device: FP8 weights are PackedTensors, everything else plain tensors.

    Scale tensors belong to their weight and have no entry of their own. `manifest` is what `fp8pack.json` says, None of
    a checkpoint that another tool made; `config` is config.json; `quant_method` the convention; `kv_scales` are the
    multipliers of K and V by point (`….self_attn.k`), empty unless it holds some.
    """

    def __init__(
        self, contents: Contents, buffers: dict[str, Tensor], manifest: Manifest | None, config: dict[str, Any]
    ) -> None:
        self.manifest, self.config = manifest, config
        self.quant_method = contents.method
        self._contents, self._buffers = contents, buffers
        self._specs = {spec.name: spec for spec in contents.tensors}
        self.kv_scales = {point: self._view(spec) for point, spec in contents.kv_scales.items()}

    def __getitem__(self, name: str) -> PackedTensor | Tensor:
        spec, quantized = self._specs[name], self._contents.quantized.get(name)
        data = self._view(spec)
        if quantized is None:
            return data
        scale = self._view(quantized.scale) if quantized.scale else torch.ones((), device=data.device)
        return PackedTensor(
            name,
            data,
            scale,
            quantized.format.name,
            quantized.granularity.name,
            quantized.granularity.region(spec.matrix),
            self._source_dtype(name),
            self._view(quantized.input_scale) if quantized.input_scale else None,
            quantized.tiled,
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)

    def fused(self, module: str) -> PackedTensor:
        """Return the weight [sum of N, K] of a module that engines fuse; a view, unless its parts lie in two shards.

        module: `….self_attn.qkv_proj`, `….mlp.gate_up_proj`, or `….experts.gate_up_proj` and `….experts.down_proj` of
        all experts; rows are in the order of the engines: q k v; gate up; gate0 up0 gate1 up1 …

        Raises:
            KeyError: no packed weight belongs to such a module.
            InputError: its parts are not packed alike, or one ends within a block.
        """
        names = sorted((name for name in self if is_part_of(name, module)), key=storage_key)
        parts = [part for part in map(self.__getitem__, names) if isinstance(part, PackedTensor)]
        if not parts:
            raise KeyError(module)
        first = parts[0]
        if len(parts) != len(names) or len({(part.format, part.granularity, part.shape[1]) for part in parts}) > 1:
            raise InputError(f"the parts of {module} are not packed alike: {', '.join(names)}")
        if first.granularity == "tensor":
            if any(not torch.equal(part.scale, first.scale) for part in parts):
                raise InputError(f"the parts of {module} have scales of their own, which one weight cannot hold")
            scale, rows = first.scale, sum(part.shape[0] for part in parts)
        else:
            if any(part.shape[0] % first.block[0] for part in parts[:-1]):
                raise InputError(f"a part of {module} ends within a block, so its scales do not fit the whole")
            if first.tiled and any(part.shape[0] % TILE[0] for part in parts[:-1]):
                raise InputError(f"a part of {module} ends within a tile of its scales, so they do not fit the whole")
            scale, rows = _join([part.scale for part in parts]), first.block[0]
        inputs = [part.input_scale for part in parts if part.input_scale is not None]
        return replace(
            first,
            name=module,
            data=_join([part.data for part in parts]),
            scale=scale,
            block=(rows, first.block[1]),
            input_scale=torch.stack(inputs).amax(0) if len(inputs) == len(parts) else None,
        )

    def _source_dtype(self, name: str) -> torch.dtype:
        entry = self.manifest.tensors.get(name) if self.manifest else None
        return _DTYPES[entry.source_dtype] if isinstance(entry, PackedEntry) else torch.bfloat16

    def _view(self, spec: TensorSpec) -> Tensor:
        dtype = _DTYPES.get(spec.dtype)
        if dtype is None:
            raise InputError(f"{spec.file}: tensor {spec.name!r} is {spec.dtype}, which torch has no type for")
        data = self._buffers[spec.file][spec.begin : spec.end]
        aligned = data if spec.begin % dtype.itemsize == 0 else data.clone()
        return (
            aligned.view(dtype).view(spec.shape)
            if math.prod(spec.shape)
            else torch.empty(spec.shape, dtype=dtype, device=data.device)
        )


def _join(parts: list[Tensor]) -> Tensor:
    """The parts below each other: a view where each begins in memory where the one before it ends, a copy elsewhere."""
    if any(before.data_ptr() + before.nbytes != after.data_ptr() for before, after in pairwise(parts)):
        return torch.cat(parts)
    rows = sum(part.shape[0] for part in parts)
    return parts[0].as_strided((rows, *parts[0].shape[1:]), parts[0].stride())


def _map(path: Path, device: torch.device) -> Tensor:
    """The bytes of a shard: mapped privately on a CPU, copied once to any other device."""
    fd = open_regular(path)
    try:
        mapped = mmap.mmap(fd, 0, access=mmap.ACCESS_COPY)
    finally:
        os.close(fd)
    buffer = torch.frombuffer(mapped, dtype=torch.uint8)
    return buffer if device.type == "cpu" else buffer.to(device)
