"""Where vLLM keeps each tensor of a checkpoint: the bytes that its parameters must have, from the files alone."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from in_vllm.engine import Loaded, bytes_of
from safetensors import safe_open
from torch import Tensor

# The engine's fused linears, and what they are made of: along the rows, in this order.
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
}
EXPERTS = {"w13": (("gate_proj", "up_proj"), ("w1", "w3")), "w2": (("down_proj",), ("w2",))}
# Parts of module names that only one side has.
_EXTRA = {"model", "language_model", "vision_model", "routed_experts"}
# Of a KV cache in FP8, which few checkpoints have; the names in files are those of three quant methods.
_OF_THE_CACHE = re.compile(r"(.*)\.\w*attn\.(k|v|q|prob)_(scale|zero_point)")
_SCALES_OF_THE_CACHE = ("{0}.{1}_scale", "{0}.{1}_proj.{1}_scale", "{0}.{1}_proj.output_scale")


def read(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


def differences(loaded: Loaded, files: Mapping[str, Tensor]) -> Iterator[str]:
    """Compare every parameter of the engine with the files, and ask for every tensor of them."""
    place = _Files(files)
    for name, found in loaded.parameters.items():
        expected = place.expected(name)
        if expected is None:
            if not _OF_THE_CACHE.fullmatch(name) or name not in loaded.unwritten:
                yield f"{name} is not in the files, and {'un' * (name in loaded.unwritten)}written"
        elif not _same(expected, found):
            yield f"{name} differs: {expected.dtype} {list(expected.shape)}, {found.dtype} {list(found.shape)}"
    yield from (f"{name} is in no parameter" for name in sorted(set(place.tensors) - place.used))


def _same(expected: Tensor, found: Tensor) -> bool:
    if min(expected.element_size(), found.element_size()) > 1:
        expected = expected.to(found.dtype)  # the engine has float32 for some parameters that are BF16 in files
    if expected.numel() == 2 * found.numel() and expected.shape[-1] == 2:
        first, second = expected.unbind(-1)  # gate and up of an expert have one input, and one scale of it
        return first.equal(second) and bytes_of(first.contiguous()).equal(bytes_of(found))
    if expected.numel() == 1 and found.numel() in (2, 3):
        expected = expected.expand(found.numel()).contiguous()  # one scale of a weight that is fused in the files
    return bytes_of(expected).equal(bytes_of(found.contiguous()))


def _shorten(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _EXTRA)


class _Files:
    """The tensors of a checkpoint under short names, and which were asked for."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = {_shorten(name): tensor for name, tensor in tensors.items()}
        self.used: set[str] = set()
        assert len(self.tensors) == len(tensors)

    def expected(self, name: str) -> Tensor | None:
        """Return what the engine's parameter of this name must be, None if the files do not have it."""
        name = _shorten(name)
        if found := re.fullmatch(r"(.*\.experts)\.(w13|w2)_(.+)", name):
            return self._experts(*found.groups())
        module, _, leaf = name.rpartition(".")
        parent, _, last = module.rpartition(".")
        ways = [[name], [f"{parent}.{part}.{leaf}" for part in FUSED.get(last, ())]]
        if (found := _OF_THE_CACHE.fullmatch(name)) and found[3] == "scale":
            ways += [[way.format(*found.groups())] for way in _SCALES_OF_THE_CACHE]
        names = next((way for way in ways if way and all(part in self.tensors for part in way)), None)
        return self._take(names) if names else None

    def _experts(self, prefix: str, which: str, leaf: str) -> Tensor | None:
        for parts in EXPERTS[which]:
            rows: list[Tensor] = []
            while all(f"{prefix}.{len(rows)}.{part}.{leaf}" in self.tensors for part in parts):
                rows.append(self._take([f"{prefix}.{len(rows)}.{part}.{leaf}" for part in parts]))
            if rows:
                return torch.stack(rows)
        return None

    def _take(self, names: list[str]) -> Tensor:
        self.used |= set(names)
        return torch.cat([torch.atleast_1d(self.tensors[name]) for name in names])
