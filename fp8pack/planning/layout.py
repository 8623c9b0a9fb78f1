"""Where each byte of the output goes.

Order inside a shard: payloads and copies whose size is a multiple of 16 first, so that every FP8 payload is
16-byte aligned; then 64- and 32-bit tensors, scales of activations last; then 16-bit tensors, then the odd rest. Within
each, parts of a fused module are adjacent in the order of the engines, payloads and scales alike, so that a fused
weight is one view.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from fp8pack.modelfacts.fused import storage_key
from fp8pack.modelfacts.spec import DTYPE_BITS, Stored, TensorSpec

ALIGNMENT = 16


@dataclass(frozen=True, slots=True)
class Constant:
    """A small output tensor whose bytes are in the plan."""

    stored: Stored
    data: bytes


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """One output file: its tensors in order, where each begins in the data section, and the header's free text."""

    file: str
    tensors: tuple[Stored, ...]
    begins: tuple[int, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of the data section."""
        return self.begins[-1] + self.tensors[-1].nbytes if self.tensors else 0


@dataclass(frozen=True, slots=True)
class Output:
    """The output of a source tensor: a payload or copy, its scale if it is quantized, and small tensors with it."""

    source: TensorSpec
    data: Stored
    scale: Stored | None = None
    small: tuple[Stored, ...] = ()

    @property
    def stored(self) -> tuple[Stored, ...]:
        """The output tensors."""
        return (self.data, *([self.scale] if self.scale else []), *self.small)


def arrange(outputs: Iterable[Output], max_shard_nbytes: int | None = None) -> tuple[ShardPlan, ...]:
    """Return the output shards: one for each source file, or as many as a size limit asks for.

    With a limit, shards are filled in the order of the engines; only a tensor over the limit makes a larger shard.
    """
    outputs = list(outputs)
    if max_shard_nbytes is None:
        files: dict[str, list[Output]] = {}
        for output in outputs:
            files.setdefault(output.source.file, []).append(output)
        return tuple(_arrange_shard(file, members) for file, members in sorted(files.items()))
    shards = _deal_out(outputs, max_shard_nbytes)
    names = (
        [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        if len(shards) > 1
        else ["model.safetensors"]
    )
    return tuple(_arrange_shard(name, members) for name, members in zip(names, shards, strict=True))


def _deal_out(outputs: list[Output], limit: int) -> list[list[Output]]:
    shards: list[list[Output]] = []
    room = 0
    for output in sorted(outputs, key=lambda output: storage_key(output.source.name)):
        nbytes = sum(stored.nbytes for stored in output.stored)
        if not shards or nbytes > room:
            shards.append([])
            room = limit
        shards[-1].append(output)
        room -= nbytes
    return shards


def _arrange_shard(file: str, outputs: list[Output]) -> ShardPlan:
    pairs = [(output, stored) for output in outputs for stored in output.stored]
    ordered = [stored for _, stored in sorted(pairs, key=lambda pair: _sort_key(*pair))]
    begins = []
    position = 0
    for stored in ordered:
        begins.append(position)
        position += stored.nbytes
    return ShardPlan(file, tuple(ordered), tuple(begins))


def _sort_key(output: Output, stored: Stored) -> tuple[object, ...]:
    source = output.source
    if stored.nbytes % ALIGNMENT == 0 and stored is output.data:
        phase = 0 if stored.dtype.startswith("F8") else 1
    else:
        phase = {64: 2, 32: 2, 16: 3}.get(DTYPE_BITS[stored.dtype], 4)
    return phase, stored in output.small, storage_key(source.name), stored.name
