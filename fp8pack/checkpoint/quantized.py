"""Reading any quantized checkpoint: which tensor is the scale of which weight, and what region shares one.

Names, dtypes and shapes decide, with what the configuration announces where they leave a choice: every convention that
was read (docs/format.md) stores the multiplier that dequantizes, under one of a dozen names; FP4 and integers are in
low_bits.py. Nothing is read but headers, config.json and its like, and the shapes of packed integers; Transformer
Engine's pickled `_extra_state` is a tensor as any other.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from operator import ge

from fp8pack.checkpoint.announcement import Announcement, read_announcement
from fp8pack.checkpoint.config import declared_dtype
from fp8pack.checkpoint.low_bits import LowBitsReader
from fp8pack.checkpoint.manifest_schema import PackedEntry
from fp8pack.checkpoint.source import Source
from fp8pack.errors import InputError
from fp8pack.modelfacts.contents import Contents, Quantized
from fp8pack.modelfacts.experts import TRANSPOSED
from fp8pack.modelfacts.spec import DTYPE_BITS, TensorSpec
from fp8pack.numerics.formats import E4M3, E5M2, Float8Format
from fp8pack.numerics.granularity import BLOCK_128, CHANNEL, MX, TENSOR, Granularity, parse_granularity
from fp8pack.numerics.swizzle import padded

_FORMATS: Mapping[str, Float8Format] = {"F8_E4M3": E4M3, "F8_E5M2": E5M2}
_SCALES = ("weight_scale_inv", "weight_scale", "scale_weight", "qscale_weight", "scale")  # beside `weight`
_INPUT_SCALES = ("input_scale", "activation_scale", "scale_input", "qscale_act")
_SCALE_DTYPES = ("F32", "BF16", "F16", "U8", "F8_E8M0")
_ODD_DTYPES = frozenset(dtype for dtype in DTYPE_BITS if dtype.startswith(("F4", "F6_")) or dtype.endswith("FNUZ"))
_KV_SCALE = re.compile(
    r"(?P<attention>.+?)(\.(k|v|qkv)_proj)?(\.attn)?\."
    r"((?P<kind>[kv])(_cache\.scale|_scale|_fake_quantizer\.qscale_act)|(?P<both>kv_scale)|(?P<output>output_scale))$"
)
_OTHER_SCALE = re.compile(  # that nothing here serves, also where a weight is no FP8
    r"\.(q_scale|prob_output_scale|output_scale|[qkv]_zero_point|input_scale|activation_scale|scale_input|qscale_act)$"
)
_LONE_SCALE = re.compile(
    r"\.(_?weight_scale|weight_scale_inv|scale_weight|qscale_weight|weight_scale_2|weight_global_scale|weight_zero_point)$"
    r"|\.experts\.\w+_scales?(_inv)?$"
)
_PACKED_OTHERWISE = re.compile(r"\.(weight|weight_packed|qweight)$|\.experts\.\w+_blocks$")


def read_contents(source: Source) -> Contents:
    """Return what a checkpoint means.

    Raises:
        InputError: a quantized weight has no scale although the checkpoint announces some, or one that fits no region;
            or a scale has no quantized weight.
    """
    announced = read_announcement(source)
    _refuse_bitsandbytes(source, announced.method)
    weights = list(_Reader(source, announced).weights())
    if not weights and not announced.method:
        return Contents("", source.specs, source.facts)
    if weights and announced.rotated:
        raise InputError(
            f"{weights[0].payload.file}: {weights[0].payload.name!r} is rotated, as `transform_config` declares, and "
            "means nothing without the rotations of its inputs",
            "use a checkpoint of this model without transforms, or its BF16 original",
        )
    tensors, hidden = {found.payload.name: found.spec for found in weights}, set(announced.markers)
    for found in weights:
        hidden.update(spec.name for spec in (found.quantized.scale, found.quantized.input_scale, *found.others) if spec)
    kv_scales = dict(_kv_scales(source.specs, hidden)) if weights else {}
    hidden.update(spec.name for spec in kv_scales.values())
    plain = [tensors.get(spec.name, spec) for spec in source.specs if spec.name not in hidden]
    _refuse_one_name_twice(plain)
    suspects = [spec for spec in plain if "scale" in spec.name or "zero_point" in spec.name]
    others = tuple(spec.name for spec in suspects if weights and _OTHER_SCALE.search(spec.name))
    quantized = {found.spec.name: found.quantized for found in weights}
    unread = tuple(spec.name for spec in plain if spec.name not in quantized and _is_packed_otherwise(spec))
    if not unread and not announced.method.startswith(
        "comfyui"
    ):  # whose converters leave scales of 1 beside BF16 weights
        _refuse_lone_scales(suspects)
    return Contents(
        announced.method,
        tuple(plain),
        source.facts,
        quantized,
        kv_scales,
        others,
        unread,
        _activations(announced, quantized),
        _spelling(announced.method, quantized),
        announced.powers_of_two or all(entry.has_exponents for entry in quantized.values()),
        announced.ignored,
    )


def read_low_bits(source: Source) -> Contents | None:
    """Return what a checkpoint of FP4 or integers means, None of any other; raises as `read_contents` does."""
    if not any(map(_is_packed_otherwise, source.specs)):
        return None
    contents = read_contents(source)
    return contents if contents.quantized and not contents.unread and contents.storage is None else None


@dataclass(frozen=True, slots=True)
class _Weight:
    payload: TensorSpec
    spec: TensorSpec  # the payload under the weight's own name
    quantized: Quantized
    others: tuple[TensorSpec, ...] = ()  # that belong to it, too


class _Reader:
    """Pairs payloads with their scales."""

    def __init__(self, source: Source, announced: Announcement) -> None:
        self._specs = {spec.name: spec for spec in source.specs}
        self._announced = announced
        self._transposed = source.facts.model_type in TRANSPOSED
        self._recorded = _recorded(source)
        self._dtype = declared_dtype(source.config or {})
        self._has_input_scales = any(name.endswith(_INPUT_SCALES) for name in self._specs)
        self._low_bits = LowBitsReader(
            source,
            self._specs,
            bits=announced.bits,
            asymmetric=announced.asymmetric,
            regions=self._of_integers,
            dtype=self._dtype,
        )

    def weights(self) -> Iterator[_Weight]:
        """Yield every quantized weight."""
        for payload in self._specs.values():
            if payload.dtype in ("U8", "I8", "I32") and (found := self._low_bits.find(payload)):
                yield _Weight(payload, found.spec, found.quantized, found.others)
        yield from self._float8()

    def _float8(self) -> Iterator[_Weight]:
        payloads = [
            spec
            for spec in self._specs.values()
            if spec.dtype in _FORMATS and not _is_scale(spec.name) and spec.name not in self._announced.markers
        ]
        scaled = self._announced.method or any(self._find_scale(spec) for spec in payloads)
        for payload in payloads:
            scale = self._find_scale(payload)
            if scale is None and (self._announced.method or (scaled and len(payload.shape) > 1)):
                raise InputError(f"{payload.file}: {payload.name!r} is {payload.dtype} and has no scale")
            format, name = _FORMATS[payload.dtype], _own_name(payload.name)
            spec = payload if name == payload.name else replace(payload, name=name)
            recorded = self._recorded.get(name)
            dtype = recorded.source_dtype if recorded else self._dtype
            if scale is None:
                yield _Weight(payload, spec, Quantized(format, TENSOR, None, source_dtype=dtype))
                continue
            module = name.removesuffix(".weight")
            tiled = module in self._announced.tiled and scale.dtype in ("U8", "F8_E8M0")
            granularity = self._granularity(spec, scale, tiled)
            scale = _first_blocks(scale, granularity, spec)
            input_scale = self._find(module, name, _INPUT_SCALES) if self._has_input_scales else None
            yield _Weight(payload, spec, Quantized(format, granularity, scale, tiled, input_scale, dtype))

    def _find_scale(self, payload: TensorSpec) -> TensorSpec | None:
        name = payload.name
        if name.endswith("_qdata"):
            found = self._specs.get(name.removesuffix("_qdata") + "_scale")
        else:
            found = self._find(name.removesuffix(".weight"), name, _SCALES)
        return found if found is not None and found.dtype in _SCALE_DTYPES else None

    def _find(self, module: str, name: str, spellings: Iterable[str]) -> TensorSpec | None:
        """The tensor of a module under one of these names; of fused experts, which are no `weight`, glued to theirs."""
        glue = f"{module}."
        if not name.endswith(".weight"):
            glue, spellings = f"{name}_", [*spellings, *(spelling.removeprefix("weight_") for spelling in spellings)]
        for spelling in spellings:
            if (found := self._specs.get(glue + spelling)) is not None:
                return found
        return None

    def _granularity(self, spec: TensorSpec, scale: TensorSpec, tiled: bool) -> Granularity:
        shape, recorded = spec.shape, self._recorded.get(spec.name)
        found: Granularity | None = None
        if recorded is not None:
            found = parse_granularity(recorded.granularity)
            stored = padded(found.scale_shape(shape)) if tiled else found.scale_shape(shape)
            found = found if prod(stored) == prod(scale.shape) else None
        elif tiled:
            found = MX if len(shape) == 2 and scale.shape == padded(MX.scale_shape(shape)) else None
        elif len(shape) == 2:
            found = self._of_matrix(shape, scale) or self._of_padded(shape, scale)
        elif len(shape) == 3:
            found = self._of_experts(shape, scale)
        elif prod(scale.shape) == 1:
            found = TENSOR
        if found is None:
            raise _unmatched(spec, scale)
        return found

    def _of_integers(self, spec: TensorSpec, scale: TensorSpec) -> Granularity:
        """The region of INT4 and INT8: one that is declared, or a channel, if any is."""
        found = self._of_matrix((spec.shape[0], spec.shape[1]), scale)
        known = {(region.rows, region.cols) for region in (*self._announced.regions, TENSOR, CHANNEL)}
        if found is None or (self._announced.regions and (found.rows, found.cols) not in known):
            raise _unmatched(spec, scale)
        return found

    def _of_matrix(self, shape: tuple[int, ...], scale: TensorSpec) -> Granularity | None:
        """What is announced, if it fits; else what the shape of the scales says."""
        n, k = shape
        stored = scale.shape
        if len(stored) == 4 and stored[1] == stored[3] == 1:  # ModelOpt's blocks
            stored = (stored[0], stored[2])
        grid = stored or (1, 1)  # ModelOpt stores a single block without dimensions
        exponents = scale.dtype in ("U8", "F8_E8M0")
        for region in self._announced.regions:
            if grid == region.scale_shape(shape):
                return region if exponents or region != MX else Granularity("group:32", 1, 32)
        if prod(stored) == 1:
            return TENSOR
        if stored in ((n,), (n, 1)):
            return CHANNEL
        usual = (MX, Granularity("block:32x32", 32, 32), BLOCK_128) if exponents else (BLOCK_128,)
        fitting = [region for region in usual if stored == region.scale_shape(shape)]
        if not fitting and len(stored) == 2 and stored[0] == n and k % stored[1] == 0:
            return Granularity(f"group:{k // stored[1]}", 1, k // stored[1])
        return fitting[0] if fitting else None

    def _of_padded(self, shape: tuple[int, ...], scale: TensorSpec) -> Granularity | None:
        """Blocks that are announced, if their grid was padded for the shards of a training run: `_first_blocks`."""
        for region in self._announced.regions:
            if (
                (region.rows or 0) > 1
                and len(scale.shape) == 2
                and all(map(ge, scale.shape, region.scale_shape(shape)))
            ):
                return region
        return None

    def _of_experts(self, shape: tuple[int, ...], scale: TensorSpec) -> Granularity | None:
        """The region of [E, N, K] taken as [E N, K], if the scales of each expert are a grid of its own."""
        count, n, k = shape
        stored = scale.shape
        if prod(stored) == 1:
            return TENSOR
        if prod(stored) == count:
            return Granularity(f"block:{n}x{k}", n, k)
        flat = tuple(dim for dim in stored if dim != 1)
        if stored == (count, 1, k) or (flat == (count, k) and (n != k or self._transposed)):
            return Granularity(f"block:{n}x1", n, 1)  # fbgemm: [E, H, 2I] with a scale for each output
        if flat == (count, n):
            return CHANNEL
        if len(stored) != 3 or stored[0] != count:
            return None
        inner: Granularity | None = self._of_matrix((n, k), replace(scale, shape=stored[1:]))
        return inner if inner is not None and n % (inner.rows or n) == 0 else None


def _first_blocks(scale: TensorSpec, granularity: Granularity, spec: TensorSpec) -> TensorSpec:
    """The scales of the blocks that a weight [N, K] has."""
    if len(spec.shape) != 2 or (granularity.rows or 0) <= 1 or len(scale.shape) != 2:
        return scale
    grid = granularity.scale_shape((spec.shape[0], spec.shape[1]))
    return scale if scale.shape == grid else replace(scale, shape=grid, strides=(scale.shape[1], 1))


def _unmatched(spec: TensorSpec, scale: TensorSpec) -> InputError:
    return InputError(
        f"{spec.file}: {spec.name!r} {list(spec.shape)} has scales {scale.dtype} {list(scale.shape)}, which match no "
        "known scale region"
    )


def _recorded(source: Source) -> dict[str, PackedEntry]:
    """What fp8pack itself recorded of packed weights; empty for what others wrote."""
    entries = source.manifest.tensors if source.manifest else {}
    return {name: entry for name, entry in entries.items() if isinstance(entry, PackedEntry)}


def _activations(announced: Announcement, quantized: Mapping[str, Quantized]) -> str:
    if any(entry.input_scale for entry in quantized.values()):
        return "static"
    return "none" if announced.weight_only else "dynamic"


def _spelling(method: str, quantized: Mapping[str, Quantized]) -> str:
    """Transformers' own names of tensor scales, which vLLM and SGLang spell otherwise."""
    own = any(
        entry.granularity == TENSOR and entry.scale and entry.scale.name.endswith("weight_scale_inv")
        for entry in quantized.values()
    )
    return "transformers" if method == "fp8" and own else ""


def _kv_scales(specs: Iterable[TensorSpec], taken: set[str]) -> Iterator[tuple[str, TensorSpec]]:
    for spec in specs:
        match = _KV_SCALE.match(spec.name) if "scale" in spec.name and spec.name not in taken else None
        if match is None or spec.dtype not in ("F32", "BF16", "F16") or prod(spec.shape) > 1024:
            continue
        projection = re.search(r"\.([kv])_proj\.", spec.name)
        kinds = match["kind"] or (projection[1] if match["output"] and projection else "kv" if match["both"] else "")
        for kind in kinds:
            yield f"{match['attention']}.{kind}", spec


def _own_name(name: str) -> str:
    """The name of a weight: torchao stores `a.b.weight` as `a.b._weight_qdata`."""
    parent, _, leaf = name.rpartition(".")
    return f"{parent}.{leaf[1:-6]}" if leaf.startswith("_") and leaf.endswith("_qdata") else name


def _is_scale(name: str) -> bool:
    return name.endswith(("_scale", "_scale_inv", ".scale", "_scale_2", "qscale_weight", "scale_weight"))


def _is_packed_otherwise(spec: TensorSpec) -> bool:
    """Whether a weight is neither floats nor FP8 as most have it: FP4, integers, or FP8 of AMD's older GPUs."""
    if spec.dtype in _ODD_DTYPES:
        return True
    return spec.dtype in ("U8", "I8", "I32") and len(spec.shape) > 1 and bool(_PACKED_OTHERWISE.search(spec.name))


def _refuse_bitsandbytes(source: Source, method: str) -> None:
    """Its values depend on tables and nested scales that differ with its version: transformers reads them itself."""
    marks = (".absmax", ".quant_map", ".SCB", ".nested_absmax")
    for spec in source.specs if method == "bitsandbytes" else ():
        if spec.name.endswith(marks) or ".quant_state." in spec.name:
            raise InputError(
                f"{spec.file}: {spec.name!r} is of bitsandbytes, whose weights are not read",
                "load the model with transformers, call `model.dequantize()` and `save_pretrained`, and use that",
            )


def _refuse_one_name_twice(tensors: Iterable[TensorSpec]) -> None:
    """A weight that is stored under another name than its own may meet a tensor that has it."""
    seen: set[str] = set()
    for spec in tensors:
        if spec.name in seen:
            raise InputError(f"{spec.file}: {spec.name!r} appears twice, once under a name of another quant method")
        seen.add(spec.name)


def _refuse_lone_scales(suspects: list[TensorSpec]) -> None:
    """A scale whose weight is not quantized means that one of the two was lost."""
    for spec in suspects:
        if _LONE_SCALE.search(spec.name):
            raise InputError(f"{spec.file}: {spec.name!r} is a scale without a quantized weight")
