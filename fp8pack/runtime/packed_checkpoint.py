"""A loaded checkpoint: a mapping from names to packed tensors and plain ones."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from fp8pack.checkpoint.source import Source
from fp8pack.errors import InputError, NoSuchName
from fp8pack.gemm.device import describe
from fp8pack.modelfacts.contents import Contents, Quantized
from fp8pack.modelfacts.fused import fused_module, is_part_of, storage_key
from fp8pack.modelfacts.spec import TensorSpec
from fp8pack.modelfacts.tensor_parallel import Part
from fp8pack.numerics.formats import E4M3
from fp8pack.numerics.swizzle import TILE
from fp8pack.numerics.torch_dtypes import TORCH_DTYPES
from fp8pack.runtime.fnuz import double
from fp8pack.runtime.memory import Memory
from fp8pack.runtime.packed_tensor import PackedTensor, grid_of
from fp8pack.units import ceil_div, format_size


class PackedCheckpoint(Mapping[str, PackedTensor | Tensor]):
    """A packed checkpoint on a device: FP8 weights are PackedTensors, everything else plain tensors.

    Scale tensors belong to their weight and have no entry of their own.
    manifest: fp8pack.json, None for a checkpoint of another tool. config: config.json. quant_method: the on-disk
    convention. activations: how inputs of linears are quantized: `dynamic`, `static` or `none`. kv_scales: the scales
    of K and V by name (`….self_attn.k`), empty if there are none.
    """

    def __init__(
        self,
        source: Source,
        contents: Contents,
        memory: Memory,
        parts: Mapping[str, Part],
        stored_weights: Collection[str],
    ) -> None:
        self.manifest, self.config = source.manifest, source.config or {}
        self.quant_method, self.activations = contents.method, contents.activations
        self._contents, self._memory, self._parts, self._stored_weights = contents, memory, parts, stored_weights
        self._specs = {spec.name: spec for spec in contents.tensors}
        self._made: dict[str, PackedTensor | Tensor] = {}
        self._fused: dict[str, PackedTensor] = {}
        self.kv_scales = {point: memory.tensor(spec) for point, spec in contents.kv_scales.items()}

    def __repr__(self) -> str:
        stored = Counter(
            f"{quantized.format.name} {quantized.granularity}"
            for name, quantized in self._contents.quantized.items()
            if name in self._specs
        )
        packed = ", ".join(f"{count} {what}" for what, count in stored.most_common())
        nbytes = format_size(sum(spec.nbytes for spec in self._specs.values()))
        return (
            f"PackedCheckpoint({packed or 'no FP8 weight'}, {len(self) - stored.total()} plain, {nbytes}, "
            f"activations={self.activations!r}, quant_method={self.quant_method!r})"
        )

    def __getitem__(self, name: str) -> PackedTensor | Tensor:
        if name not in self._made:
            if name not in self._specs:
                raise NoSuchName(name, self._specs)
            spec, quantized = self._specs[name], self._contents.quantized.get(name)
            self._made[name] = self._packed(spec, quantized) if quantized else self._memory.tensor(spec)
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)

    def release_pages(self) -> None:
        """On a CPU, give back the pages of the files that were read; they are read again at the next use.

        What was written into a tensor is lost.
        """
        self._memory.release()

    def fused(self, module: str) -> PackedTensor:
        """Return the weight [sum of N, K] of a module that engines fuse; a view if its parts are in one shard.

        module: `….self_attn.qkv_proj`, `….mlp.gate_up_proj`, or `….experts.gate_up_proj` and `….experts.down_proj` of
        all experts; rows are in the order of the engines: q k v; gate up; gate0 up0 gate1 up1 …

        Raises:
            KeyError: no packed weight belongs to such a module.
            InputError: a part is not loaded, the parts differ in format or granularity, or one ends within a block.
        """
        if module not in self._fused:
            self._fused[module] = self._fuse(module)
        return self._fused[module]

    def _fuse(self, module: str) -> PackedTensor:
        names = sorted((name for name in self if is_part_of(name, module)), key=storage_key)
        parts = [part for part in map(self.__getitem__, names) if isinstance(part, PackedTensor)]
        if not parts:
            raise NoSuchName(module, {fused for name in self if (fused := fused_module(name))})
        if missing := [name for name in self._stored_weights if is_part_of(name, module) and name not in self._specs]:
            raise InputError(f"{missing[0]} belongs to {module} and is not loaded", f"add {missing[0]!r} to `tensors`")
        first = parts[0]
        if len(parts) != len(names) or len({(part.format, part.granularity, part.shape[1]) for part in parts}) > 1:
            raise InputError(f"the parts of {module} differ in format, granularity or K: {', '.join(names)}")
        if first.granularity == "tensor":
            if any(not torch.equal(part.stored_scale, first.stored_scale) for part in parts):
                raise InputError(f"the parts of {module} have different scales, and one weight [N, K] has one")
            scale, rows = first.stored_scale, sum(part.shape[0] for part in parts)
        else:
            if any(part.shape[0] % first.block[0] for part in parts[:-1]):
                raise InputError(f"a part of {module} ends within a block of its scales, so they cannot be joined")
            if first.tiled and any(part.shape[0] % TILE[0] for part in parts[:-1]):
                raise InputError(f"a part of {module} ends within a tile of its scales, so they cannot be joined")
            scale, rows = _join([part.stored_scale for part in parts]), first.block[0]
        inputs = [part.input_scale for part in parts if part.input_scale is not None]
        return replace(
            first,
            name=module,
            qdata=_join([part.qdata for part in parts]),
            stored_scale=scale,
            block=(rows, first.block[1]),
            input_scale=torch.stack(inputs).amax(0) if len(inputs) == len(parts) else None,
        )

    def _packed(self, spec: TensorSpec, quantized: Quantized) -> PackedTensor:
        qdata = self._memory.tensor(spec)
        whole = PackedTensor(
            spec.name,
            qdata,
            self._memory.tensor(quantized.scale) if quantized.scale else torch.ones((), device=qdata.device),
            quantized.format.name,
            quantized.granularity.name,
            quantized.granularity.region(spec.matrix),
            TORCH_DTYPES[quantized.source_dtype],
            self._memory.tensor(quantized.input_scale) if quantized.input_scale else None,
            quantized.tiled,
            self.activations == "none",
        )
        part = self._parts.get(spec.name)
        if part is not None:
            shape = spec.shape
            scale = _part_of_scales(whole, (shape[0], shape[1]), part)
            whole = replace(whole, stored_scale=scale, block=quantized.granularity.region(part.shape), tiled=False)
        if describe(qdata.device).is_fnuz and quantized.format == E4M3:
            whole = replace(whole, qdata=qdata.view(torch.float8_e4m3fnuz), stored_scale=double(whole.stored_scale))
        return whole


def _part_of_scales(weight: PackedTensor, shape: tuple[int, int], part: Part) -> Tensor:
    """The scales of a part of a weight [N, K], as a grid in rows."""
    if weight.stored_scale.numel() == 1:
        return weight.stored_scale
    rows, cols = weight.block
    grid = grid_of(weight.stored_scale, shape, weight.block, tiled=weight.tiled)
    left, right = part.cols[0] // cols, ceil_div(part.cols[1], cols)
    return torch.cat([grid[lo // rows : ceil_div(hi, rows), left:right] for lo, hi in part.rows])


def _is_behind(after: Tensor, before: Tensor) -> bool:
    """Whether one begins where another ends, in the same buffer: separate buffers of a GPU may be adjacent, too."""
    same = after.untyped_storage().data_ptr() == before.untyped_storage().data_ptr()
    return same and before.data_ptr() + before.nbytes == after.data_ptr()


def _join(parts: list[Tensor]) -> Tensor:
    """The parts, concatenated: a view if they are adjacent in memory, else a copy."""
    if any(not _is_behind(after, before) for before, after in pairwise(parts)):
        return torch.cat(parts)
    rows = sum(part.shape[0] for part in parts)
    return parts[0].as_strided((rows, *parts[0].shape[1:]), parts[0].stride())
