"""Which tensors engines fuse into one module, and the order in which they are stored."""

import re
import sys

EXPERT = re.compile(r"(?P<parent>.*(^|\.)experts)\.(?P<index>\d+)\.(?P<leaf>\w+)$")
# Whole on every GPU, and in SGLang one weight: vLLM models/deepseek_v2.py, SGLang models/deepseek_v2.py.
REPLICATED = ("q_a_proj", "kv_a_proj_with_mqa")
LAST_PARTS = ("v_proj", "value", "wv", "up_proj", "w3", "kv_a_proj_with_mqa")

# Which parts an engine fuses into one module, in its order.
_FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "qkv": ("query", "key", "value"),
    "wqkv": ("wq", "wk", "wv"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "w13": ("w1", "w3"),
}
_FUSED_LEAF = {leaf: (fused, rank) for fused, leaves in _FUSED.items() for rank, leaf in enumerate(leaves)}


def fused_module(name: str) -> str | None:
    """Return the module that engines fuse this weight into (`….self_attn.qkv_proj`), None for a weight of its own."""
    parent, _, leaf = name.removesuffix(".weight").rpartition(".")
    if not name.endswith(".weight") or leaf not in _FUSED_LEAF:
        return None
    return sys.intern(f"{parent}.{_FUSED_LEAF[leaf][0]}")  # its parts share it


def is_part_of(name: str, module: str) -> bool:
    """Say whether engines fuse this weight into a module: `….qkv_proj`, or `….experts.gate_up_proj` of all experts."""
    match = EXPERT.match(name.removesuffix(".weight"))
    if match and name.endswith(".weight"):
        leaf = _FUSED_LEAF.get(match["leaf"], (match["leaf"], 0))[0]
        return module in (f"{match['parent']}.{leaf}", f"{match['parent']}.{match['index']}.{leaf}")
    return fused_module(name) == module


def together(name: str) -> str | None:
    """Return the group that must be quantized or ignored as one: the experts of a layer, or a fused module."""
    match = EXPERT.match(name.removesuffix(".weight"))
    return match["parent"] if match and name.endswith(".weight") else fused_module(name)


def storage_key(name: str) -> tuple[tuple[tuple[int, int, str], ...], int, int, int]:
    """Return the key that sorts tensors as engines fuse them: q k v; gate up; gate0 up0 gate1 up1 … down0 down1 …

    Numbers in names sort as numbers. Names sort by their fused module first.
    """
    module, suffix = (name.removesuffix(".weight"), name.endswith(".weight"))
    parent, _, leaf = module.rpartition(".")
    fused, rank = _FUSED_LEAF.get(leaf, (leaf, 0))
    match = EXPERT.match(module)
    if not suffix:
        return _natural(name), 0, 0, 0
    if match:
        return _natural(match["parent"]), int(leaf not in _FUSED_LEAF), int(match["index"]), rank
    return _natural(f"{parent}.{fused}"), 0, 0, rank


def _natural(name: str) -> tuple[tuple[int, int, str], ...]:
    parts = re.split(r"(\d+)", name)
    return tuple((1, int(part), "") if part.isdecimal() and len(part) < 19 else (0, 0, part) for part in parts)
