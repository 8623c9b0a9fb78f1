"""Fused experts: one 3-D tensor for all experts of a layer, split into the 2-D weights that every loader reads.

[E, 2I, H]  gate above up: transformers 5, Qwen3.5-MoE, GLM, DeepSeek; down is [E, H, I]
[E, H, 2I]  the transpose: Llama 4, Qwen3-VL-MoE, gpt-oss; down is [E, I, H]
gpt-oss interleaves gate and up, and has biases; its MXFP4 lies as [E, 2I, H], and is a view with strides. A part is a
view: nothing is read or copied here.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from fp8pack.errors import InputError
from fp8pack.modelfacts.contents import Contents, Quantized
from fp8pack.modelfacts.model import ModelFacts
from fp8pack.modelfacts.patterns import star
from fp8pack.modelfacts.spec import DTYPE_BITS, ELEMENT_BITS, FLOAT_DTYPES, TensorSpec, nbytes_of
from fp8pack.numerics.granularity import CHANNEL, MX, TENSOR, Granularity
from fp8pack.units import ceil_div

_FUSED = re.compile(r"(?P<experts>(.+\.)?experts)\.(?P<leaf>\w+?)(\.weight|(?P<bias>_bias))?$")
_PARTS = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "down_proj": ("down_proj",),
    "gate_proj": ("gate_proj",),
    "up_proj": ("up_proj",),
    "w13": ("w1", "w3"),
    "w1": ("w1",),
    "w2": ("w2",),
    "w3": ("w3",),
}
_TAKES_HIDDEN = ("gate_up_proj", "gate_proj", "up_proj", "w13", "w1", "w3")  # K is the hidden size
TRANSPOSED = ("llama4", "llama4_text", "qwen3_vl_moe", "qwen3_vl_moe_text", "qwen3_omni_moe", "gpt_oss")
_INTERLEAVED = ("gpt_oss",)

_ONE = re.compile(r"(?P<experts>(.+\.)?experts)\.(?P<index>\d{1,5})\.(?P<leaf>\w+)\.(?P<kind>weight|bias)$")

Split = tuple[TensorSpec, Quantized | None]


@dataclass(frozen=True, slots=True)
class FusedLayout:
    """The layout of fused experts: whether N is the last dimension, and whether gate and up are interleaved."""

    transposed: bool = False
    interleaved: bool = False


def split_experts(contents: Contents) -> Contents:
    """Return the contents with fused experts split into one weight per expert, with its scale if it is quantized.

    Experts are not split if their layout is unknown, by the hidden size and by the model's type, or if two of them
    share a scale.

    Raises:
        InputError: the checkpoint also has one of these experts as a tensor of its own.
    """
    tensors: list[TensorSpec] = []
    layouts = _layouts(contents)
    quantized, names = dict(contents.quantized), {spec.name for spec in contents.tensors}
    for spec in contents.tensors:
        parts = _split(spec, contents.facts, layouts, quantized.get(spec.name))
        tensors += [part for part, _ in parts] or [spec]
        quantized |= {part.name: stored for part, stored in parts if stored is not None}
        if twice := next((part.name for part, _ in parts if part.name in names), None):
            raise InputError(f"{twice!r} appears twice: alone and in {spec.name!r}", "remove one of the two tensors")
    return replace(contents, tensors=tuple(tensors), quantized=quantized)


@dataclass(frozen=True, slots=True)
class JoinedExperts:
    """A fused tensor, and the weight of each expert with its view into that tensor."""

    whole: TensorSpec
    parts: tuple[tuple[TensorSpec, TensorSpec], ...]


def join_experts(
    tensors: Sequence[TensorSpec], model_type: str, layouts: Mapping[str, FusedLayout | None]
) -> list[JoinedExperts]:
    """Return the fused tensors that the experts of each layer were taken apart from, the reverse of split_experts().

    layouts: the names of fused tensors, `*` for numbers -> how they lie, None as the model type says. A layer is left
    as it is if one of its experts is missing or has another shape. A fused tensor has the dtype of its parts if that
    is a float, else U8.
    """
    layers: dict[str, dict[str, TensorSpec]] = {}
    for spec in tensors:
        if match := _ONE.match(spec.name):
            layers.setdefault(match["experts"], {})[spec.name] = spec
    joined = []
    for experts, members in layers.items():
        found: list[JoinedExperts] = []
        for stem, layout in layouts.items():
            if stem.rpartition(".")[0] == star(experts):
                transposed = layout.transposed if layout else model_type in TRANSPOSED
                whole = FusedLayout(transposed, interleaved=model_type in _INTERLEAVED)
                found += _join(f"{experts}.{stem.rpartition('.')[2]}", members, whole)
        if {part.name for each in found for part, _ in each.parts} == members.keys():
            joined += found
    return joined


def _join(name: str, members: Mapping[str, TensorSpec], layout: FusedLayout) -> list[JoinedExperts]:
    experts, _, leaf = name.rpartition(".")
    is_bias = leaf.endswith("_bias")
    leaf, kind = leaf.removesuffix("_bias"), "bias" if is_bias else "weight"
    names, count = _PARTS.get(leaf, ()), 0
    while names and f"{experts}.{count}.{names[0]}.{kind}" in members:
        count += 1
    if count == 0 or (layout.interleaved and not layout.transposed):
        return []
    first = members[f"{experts}.0.{names[0]}.{kind}"]
    n, wide = first.shape[0], first.shape[0] * len(names)
    k = first.shape[-1]
    shape = (count, wide) if is_bias else (count, k, wide) if layout.transposed else (count, wide, k)
    dtype = first.dtype if first.dtype in FLOAT_DTYPES else "U8"  # whose elements are counted, not read
    whole = TensorSpec(name, dtype, shape, first.file, 0, nbytes_of(dtype, shape))
    if is_bias:
        views = [view for i in range(count) for view in _bias(whole, experts, i, leaf, layout.interleaved)]
    else:
        views = [view for i in range(count) for view, _ in _matrices(whole, f"{experts}.{i}", leaf, layout, None)]
    found = [members.get(view.name) for view in views]
    parts = [
        (part, view) for part, view in zip(found, views, strict=True) if part is not None and part.shape == view.shape
    ]
    return [JoinedExperts(whole, tuple(parts))] if len(parts) == len(views) and n else []


def _layouts(contents: Contents) -> dict[str, FusedLayout]:
    """The layout of the experts of each layer.

    The hidden size is K of gate and up, and N of down. A square tensor does not show its layout; another of the layer
    does, since 2I and I are not both the hidden size. If none does, the model's type decides.
    """
    facts, known = contents.facts, contents.facts.model_type in TRANSPOSED
    interleaved = facts.model_type in _INTERLEAVED
    found: dict[str, FusedLayout] = {}
    for spec in contents.tensors:
        match = _FUSED.match(spec.name)
        if match is None or match["bias"] or match["leaf"] not in _PARTS or len(spec.shape) != 3:
            continue
        _, rows, cols = spec.shape
        hidden_first = rows == facts.hidden_size
        if rows != cols and facts.hidden_size in (rows, cols):
            takes_hidden = match["leaf"] in _TAKES_HIDDEN
            found[match["experts"]] = FusedLayout(hidden_first == takes_hidden, interleaved)
        elif known:
            found.setdefault(match["experts"], FusedLayout(True, interleaved))
    return found


def _split(
    spec: TensorSpec, facts: ModelFacts, layouts: Mapping[str, FusedLayout], quantized: Quantized | None
) -> list[Split]:
    match = _FUSED.match(spec.name)
    if match is None or match["leaf"] not in _PARTS or len(spec.shape) != (2 if match["bias"] else 3):
        return []
    experts, leaf, count, layout = match["experts"], match["leaf"], spec.shape[0], layouts.get(match["experts"])
    if layout is None:
        return []
    if match["bias"]:
        return [(part, None) for i in range(count) for part in _bias(spec, experts, i, leaf, layout.interleaved)]
    if len(_PARTS[leaf]) == 2 and spec.shape[2 if layout.transposed else 1] % 2:
        return []
    parts = [part for i in range(count) for part in _matrices(spec, f"{experts}.{i}", leaf, layout, quantized)]
    return [] if quantized and any(stored is None for _, stored in parts) else parts


def _matrices(
    spec: TensorSpec, expert: str, leaf: str, layout: FusedLayout, quantized: Quantized | None
) -> list[Split]:
    """The weights [N, K] of one expert."""
    _, rows, cols = spec.shape
    index, names = int(expert.rpartition(".")[2]), _PARTS[leaf]
    wide, k = (cols, rows) if layout.transposed else (rows, cols)
    n = wide // len(names)
    parts: list[Split] = []
    for rank, name in enumerate(names):
        first = rank if layout.interleaved else rank * n
        part = _matrix(spec, f"{expert}.{name}.weight", (n, k), (index, first), layout, step=len(names))
        parts.append((part, _scales(spec, part, quantized, index, first, layout) if quantized else None))
    return parts


def _matrix(
    spec: TensorSpec, name: str, shape: tuple[int, int], at: tuple[int, int], layout: FusedLayout, *, step: int
) -> TensorSpec:
    """A part [N, K] of a fused tensor: of which expert, from which of its N; every `step`-th if interleaved."""
    (index, first), (down, across) = at, spec.strides or (spec.shape[2], 1)
    along_n, along_k = (across, down) if layout.transposed else (down, across)
    strides = (along_n * (step if layout.interleaved else 1), along_k)
    return _view(spec, name, shape, index * prod(spec.shape[1:]) + first * along_n, strides)


def _bias(spec: TensorSpec, experts: str, index: int, leaf: str, interleaved: bool) -> list[TensorSpec]:
    names, wide = _PARTS[leaf], spec.shape[1]
    n, step = wide // len(names), len(names) if interleaved else 1
    return [
        _view(spec, f"{experts}.{index}.{name}.bias", (n,), index * wide + (r if interleaved else r * n), (wide, step))
        for r, name in enumerate(names)
    ]


def _view(spec: TensorSpec, name: str, shape: tuple[int, ...], offset: int, strides: tuple[int, int]) -> TensorSpec:
    """A part of a fused tensor; `offset` and `strides` are in elements."""
    bits, rows, cols = ELEMENT_BITS[spec.dtype], prod(shape[:-1]), shape[-1]
    begin = spec.begin + offset * bits // 8
    end = begin + ceil_div(((rows - 1) * strides[0] + (cols - 1) * strides[1] + 1) * bits, 8)
    is_range = strides[1] == 1 and (rows == 1 or strides[0] == cols)
    return TensorSpec(name, spec.dtype, shape, spec.file, begin, end, spec, None if is_range else strides)


def _scales(
    spec: TensorSpec, part: TensorSpec, quantized: Quantized, index: int, first: int, layout: FusedLayout
) -> Quantized | None:
    """How a part is dequantized: its piece of the fused scales, None if another part shares a scale.

    first: its first row of N.
    """
    scale, region, (_, rows, cols) = quantized.scale, quantized.granularity, spec.shape
    entry = replace(quantized, input_scale=_of_expert(quantized.input_scale, index, spec.shape[0]))
    if scale is None or region == TENSOR:
        return entry
    if (region.rows, region.cols) == (rows, cols):
        return replace(entry, granularity=TENSOR, scale=_of_expert(scale, index, spec.shape[0]))
    n, _ = part.shape
    if scale.strides and region.rows:  # groups of K, a row of them for each of N
        groups = Granularity(f"group:{region.rows}", 1, region.rows) if region.rows != MX.cols else MX
        step = cols // n if layout.interleaved else 1
        piece = _matrix(scale, scale.name, groups.scale_shape(part.shape), (index, first), layout, step=step)
        return replace(entry, granularity=groups, scale=replace(piece, part_of=None))
    if layout.transposed:
        of_outputs = (region.rows, region.cols) == (rows, 1) or (region == CHANNEL and rows == cols)
        if of_outputs and not layout.interleaved:
            return replace(entry, granularity=CHANNEL, scale=_piece(scale, (n, 1), index * cols + first))
    elif not layout.interleaved and first % (region.rows or 1) == 0:
        grid_rows, grid_cols = region.scale_shape((rows, cols))
        begin = (index * grid_rows + first // (region.rows or 1)) * grid_cols
        return replace(entry, scale=_piece(scale, region.scale_shape(part.shape), begin))
    return None


def _of_expert(scale: TensorSpec | None, index: int, count: int) -> TensorSpec | None:
    """The scale of one expert out of [E]; a single scale is shared by all."""
    return scale if scale is None or prod(scale.shape) != count else _piece(scale, (), index)


def _piece(scale: TensorSpec, shape: tuple[int, ...], begin: int) -> TensorSpec:
    itemsize = DTYPE_BITS[scale.dtype] // 8
    first = scale.begin + begin * itemsize
    return replace(scale, shape=shape, begin=first, end=first + prod(shape) * itemsize)
