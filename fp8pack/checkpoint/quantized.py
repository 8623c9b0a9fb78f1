"""Reading any FP8 checkpoint: which tensor is the scale of which weight, and what region shares one.

Names, dtypes and shapes decide, with what the configuration announces where they leave a choice: every convention that
was read (docs/format.md) stores the multiplier that dequantizes, under one of a dozen names. Nothing is read but
headers, config.json and its like; Transformer Engine's pickled `_extra_state` is a tensor as any other.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from fp8pack.checkpoint.manifest_schema import PackedEntry, find_manifest, read_manifest
from fp8pack.checkpoint.source import ShardReader, Source, read_json
from fp8pack.errors import InputError, RecipeError
from fp8pack.numerics.formats import E4M3, E5M2, Float8Format
from fp8pack.numerics.granularity import BLOCK_128, CHANNEL, MX, TENSOR, Granularity, parse_granularity
from fp8pack.numerics.swizzle import padded
from fp8pack.planning.contents import Contents, Quantized
from fp8pack.planning.experts import TRANSPOSED
from fp8pack.planning.spec import TensorSpec

_FORMATS: Mapping[str, Float8Format] = {"F8_E4M3": E4M3, "F8_E5M2": E5M2}
_SCALES = ("weight_scale_inv", "weight_scale", "scale_weight", "qscale_weight", "scale")  # beside `weight`
_INPUT_SCALES = ("input_scale", "activation_scale", "scale_input", "qscale_act")
_SCALE_DTYPES = ("F32", "BF16", "F16", "U8", "F8_E8M0")
_KV_SCALE = re.compile(
    r"(?P<attention>.+?)(\.(k|v|qkv)_proj)?(\.attn)?\."
    r"((?P<kind>[kv])(_cache\.scale|_scale|_fake_quantizer\.qscale_act)|(?P<both>kv_scale)|(?P<output>output_scale))$"
)
_OTHER_SCALE = re.compile(  # that nothing here serves, also where a weight is no FP8
    r"\.(q_scale|prob_output_scale|output_scale|[qkv]_zero_point|input_scale|activation_scale|scale_input|qscale_act)$"
)
_LONE_SCALE = re.compile(
    r"\.(_?weight_scale|weight_scale_inv|scale_weight|qscale_weight)$|\.experts\.\w+_scale(_inv)?$"
)
_MARKER = re.compile(r"(^|\.)(comfy_quant|scaled_fp8)$")
_PACKED_OTHERWISE = re.compile(r"\.(weight|weight_packed|qweight)$|\.experts\.\w+_blocks$")
_MAX_MARKER_NBYTES = 4096
_REGION_KEYS = ("weight_block_size", "block_structure", "block_size", "group_size")


def read_contents(source: Source) -> Contents:
    """Return what a checkpoint means.

    Raises:
        InputError: an FP8 weight has no scale although the checkpoint announces some, or one that fits no region; or
            a scale has no FP8 weight.
    """
    config = find_quantization(source)
    method = str(config.get("quant_method", "")).lower()
    reader = _Reader(source, method, _regions(config))
    weights = list(reader.weights())
    if not weights and not method:
        return Contents("", source.specs, source.facts)
    tensors, hidden = {found.payload.name: found.spec for found in weights}, set(reader.markers)
    for found in weights:
        hidden.update(spec.name for spec in (found.quantized.scale, found.quantized.input_scale) if spec)
    kv_scales = dict(_kv_scales(source.specs, hidden)) if weights else {}
    hidden.update(spec.name for spec in kv_scales.values())
    plain = [tensors.get(spec.name, spec) for spec in source.specs if spec.name not in hidden]
    others = tuple(spec.name for spec in plain if weights and _OTHER_SCALE.search(spec.name))
    unread = tuple(spec.name for spec in plain if _is_packed_otherwise(spec))
    quantized = {found.spec.name: found.quantized for found in weights}
    if not unread and not method.startswith("comfyui"):  # whose converters leave scales of 1 beside BF16 weights
        _refuse_lone_scales(plain)
    return Contents(
        method or ("comfyui" if reader.markers else ""),
        tuple(plain),
        source.facts,
        quantized,
        kv_scales,
        others,
        unread,
        _activations(config, quantized, _marked_weight_only(source, reader)),
        _spelling(method, quantized),
        config.get("scale_fmt") == "ue8m0" or all(entry.has_exponents for entry in quantized.values()),
    )


def find_quantization(source: Source) -> dict[str, Any]:
    """Return the quantization that a checkpoint announces, with its `quant_method`; empty if it announces none.

    Looked for where engines look: config.json and its sections, then the files of ModelOpt and AutoRound, Mistral's
    params.json, and the metadata of torchao and ComfyUI.
    """
    config = source.config or {}
    for section in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in ("quantization_config", "compression_config"):
            found = section.get(key)
            if isinstance(found, dict) and found:
                return {"quant_method": "compressed-tensors", **found}
    if source.is_single_file:
        return _from_metadata(source)
    for name, key, method in (
        ("hf_quant_config.json", "quantization", "modelopt"),
        ("quantization_config.json", "", "auto-round"),
        ("params.json", "quantization", "mistral"),
    ):
        if (source.directory / name).exists():
            document = read_json(source.directory / name)
            found = document.get(key) if key else document
            if isinstance(found, dict) and found:
                return {"quant_method": method, **found}
    return _from_metadata(source)


@dataclass(frozen=True, slots=True)
class _Weight:
    payload: TensorSpec
    spec: TensorSpec  # the payload under the weight's own name
    quantized: Quantized


class _Reader:
    """Pairs FP8 payloads with their scales."""

    def __init__(self, source: Source, method: str, regions: list[Granularity]) -> None:
        self.specs = {spec.name: spec for spec in source.specs}
        self.markers = [spec.name for spec in source.specs if _MARKER.search(spec.name)]
        self._method, self._regions = method, regions
        self._transposed = source.facts.model_type in TRANSPOSED
        self._entries = _manifest_entries(source)
        self._tiled = _tiled_layers(source, self.markers)

    def weights(self) -> Iterator[_Weight]:
        """Yield every FP8 weight."""
        payloads = [
            spec
            for spec in self.specs.values()
            if spec.dtype in _FORMATS and not _is_scale(spec.name) and not _MARKER.search(spec.name)
        ]
        scaled = self._method or any(self._find_scale(spec) for spec in payloads)
        for payload in payloads:
            scale = self._find_scale(payload)
            if scale is None and (self._method or (scaled and len(payload.shape) > 1)):
                raise InputError(f"{payload.file}: {payload.name!r} is {payload.dtype} and has no scale")
            format, name = _FORMATS[payload.dtype], _own_name(payload.name)
            spec = replace(payload, name=name)
            if scale is None:
                yield _Weight(payload, spec, Quantized(format, TENSOR, None))
                continue
            module = name.removesuffix(".weight")
            tiled = module in self._tiled and scale.dtype in ("U8", "F8_E8M0")
            granularity = self._granularity(spec, scale, tiled)
            input_scale = self._find(module, name, _INPUT_SCALES)
            yield _Weight(payload, spec, Quantized(format, granularity, scale, tiled, input_scale))

    def _find_scale(self, payload: TensorSpec) -> TensorSpec | None:
        name = payload.name
        if name.endswith("_qdata"):
            found = self.specs.get(name.removesuffix("_qdata") + "_scale")
        else:
            found = self._find(name.removesuffix(".weight"), name, _SCALES)
        return found if found is not None and found.dtype in _SCALE_DTYPES else None

    def _find(self, module: str, name: str, spellings: Iterable[str]) -> TensorSpec | None:
        """The tensor of a module under one of these names; of fused experts, which are no `weight`, glued to theirs."""
        if name.endswith(".weight"):
            names = [f"{module}.{spelling}" for spelling in spellings]
        else:
            names = [f"{name}_{spelling}" for spelling in spellings]
            names += [f"{name}_{spelling.removeprefix('weight_')}" for spelling in spellings]
        return next((self.specs[name] for name in names if name in self.specs), None)

    def _granularity(self, spec: TensorSpec, scale: TensorSpec, tiled: bool) -> Granularity:
        shape, entry = spec.shape, self._entries.get(spec.name)
        found: Granularity | None = None
        if entry is not None:
            found = parse_granularity(entry.granularity)
            stored = padded(found.scale_shape(shape)) if tiled else found.scale_shape(shape)
            found = found if prod(stored) == prod(scale.shape) else None
        elif tiled:
            found = MX if len(shape) == 2 and scale.shape == padded(MX.scale_shape(shape)) else None
        elif len(shape) == 2:
            found = self._of_matrix(shape, scale)
        elif len(shape) == 3:
            found = self._of_experts(shape, scale)
        elif prod(scale.shape) == 1:
            found = TENSOR
        if found is None:
            raise InputError(
                f"{spec.file}: {spec.name!r} {list(shape)} has scales {scale.dtype} {list(scale.shape)}, which fit no "
                "region that is known"
            )
        return found

    def _of_matrix(self, shape: tuple[int, ...], scale: TensorSpec) -> Granularity | None:
        """What is announced, if it fits; else what the shape of the scales says."""
        n, k = shape
        stored = scale.shape
        if len(stored) == 4 and stored[1] == stored[3] == 1:  # ModelOpt's blocks
            stored = (stored[0], stored[2])
        grid = stored or (1, 1)  # ModelOpt stores a single block without dimensions
        exponents = scale.dtype in ("U8", "F8_E8M0")
        for region in self._regions:
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


def _manifest_entries(source: Source) -> dict[str, PackedEntry]:
    """What fp8pack itself recorded of packed weights; empty for what others wrote."""
    path = find_manifest(source.path)
    if path is None:
        return {}
    tensors = read_manifest(path).tensors
    return {name: entry for name, entry in tensors.items() if isinstance(entry, PackedEntry)}


def _from_metadata(source: Source) -> dict[str, Any]:
    if any("tensor_names" in file.metadata for file in source.files):
        return {"quant_method": "torchao"}
    if any("_quantization_metadata" in file.metadata for file in source.files):
        return {"quant_method": "comfyui"}
    names = [spec.name for spec in source.specs if _MARKER.search(spec.name)]
    if any(name.endswith("comfy_quant") for name in names):
        return {"quant_method": "comfyui"}
    return {"quant_method": "comfyui-scaled"} if names else {}


def _tiled_layers(source: Source, markers: list[str]) -> set[str]:
    """The modules whose exponents lie in tiles: ComfyUI's always, torchao's where the metadata says so."""
    tiled = {marker.removesuffix(".comfy_quant") for marker in markers}
    for file in source.files:
        if layers := _parse(file.metadata.get("_quantization_metadata")).get("layers"):
            tiled.update(layers if isinstance(layers, dict) else ())
        for name, text in file.metadata.items():
            if "is_swizzled_scales" in text:
                data = _parse(text).get("_data")
                if isinstance(data, dict) and data.get("is_swizzled_scales") is True:
                    tiled.add(name.removesuffix(".weight"))
    return tiled


def _parse(text: str | None) -> dict[str, Any]:
    try:
        document = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def plain_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the free text of a file without what a convention says there of its tensors."""
    own = ("tensor_names", "_quantization_metadata", "quant_format")
    return {key: text for key, text in metadata.items() if key not in own and '"_type"' not in text}


def _regions(config: dict[str, Any]) -> list[Granularity]:
    """Every region that a configuration names for weights, under whatever key, in its order."""
    found: list[Granularity] = []
    if config.get("quant_method") == "fp8pack":
        with suppress(RecipeError):
            found.append(parse_granularity(str(config.get("granularity"))))
    if str(config.get("quant_algo")).lower() in ("fp8_pb_wo", "fp8_pb_real"):  # ModelOpt's names of blocks
        found.append(BLOCK_128)
    found += [region for key, value in _walk(config, 0) if key in _REGION_KEYS and (region := _region(value))]
    return list(dict.fromkeys(found))


def _region(value: Any) -> Granularity | None:
    """The region of a size as configurations write it: [128, 128], "128x128", 32."""
    match value:
        case str() if found := re.fullmatch(r"(\d{1,6})x(\d{1,9})", value):
            return _region([int(found[1]), int(found[2])])
        case [int(rows), int(cols)] if rows > 0 and cols > 0:
            return Granularity(f"block:{rows}x{cols}", rows, cols) if rows > 1 else _group(cols)
        case int(cols) if cols > 0:
            return _group(cols)
    return None


def _group(cols: int) -> Granularity:
    return MX if cols == 32 else Granularity(f"group:{cols}", 1, cols)


def _walk(value: Any, depth: int) -> Iterator[tuple[str, Any]]:
    """The entries of a document, but for what it says of activations."""
    if depth < 8 and isinstance(value, dict):
        for key, inner in value.items():
            if not key.startswith(("act_", "input_", "output_", "kv_cache_")):
                yield key, inner
                yield from _walk(inner, depth + 1)


def _marked_weight_only(source: Source, reader: "_Reader") -> bool:
    """Whether ComfyUI's markers ask for products in full precision: JSON in the new ones, two elements in the old."""
    for name in reader.markers:
        spec = reader.specs[name]
        if name.endswith("scaled_fp8"):
            return prod(spec.shape) == 2
        if spec.nbytes <= _MAX_MARKER_NBYTES:
            with closing(ShardReader(source.directory / spec.file)) as opened:
                text = bytearray(spec.nbytes)
                opened.readinto(memoryview(text), spec.begin)
            return _parse(text.decode(errors="replace")).get("full_precision_matrix_mult") is True
    return False


def _activations(config: dict[str, Any], quantized: Mapping[str, Quantized], marked: bool) -> str:
    if any(entry.input_scale for entry in quantized.values()):
        return "static"
    match config:
        case {"config_groups": dict(groups)} if groups:  # compressed-tensors, ModelOpt
            weight_only = all(isinstance(g, dict) and g.get("input_activations") is None for g in groups.values())
        case {"global_quant_config": {"weight": dict(), "input_tensors": inputs}}:  # Quark
            weight_only = inputs is None
        case {"quant_type": {"default": {"_type": str(kind)}}}:  # torchao
            weight_only = "WeightOnly" in kind
        case _:
            weight_only = marked or config.get("activation_scheme") == "none"
    return "none" if weight_only else "dynamic"


def _spelling(method: str, quantized: Mapping[str, Quantized]) -> str:
    """Transformers' own names of tensor scales, which vLLM and SGLang spell otherwise."""
    own = any(
        entry.granularity == TENSOR and entry.scale and entry.scale.name.endswith("weight_scale_inv")
        for entry in quantized.values()
    )
    return "transformers" if method == "fp8" and own else ""


def _kv_scales(specs: Iterable[TensorSpec], taken: set[str]) -> Iterator[tuple[str, TensorSpec]]:
    for spec in specs:
        match = _KV_SCALE.match(spec.name)
        if match is None or spec.name in taken or spec.dtype not in ("F32", "BF16", "F16") or prod(spec.shape) > 1024:
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
    """Whether it is FP4, an integer format, or FP8 as AMD's older GPUs have it, where a weight should be."""
    if spec.dtype.startswith(("F4", "F6")) or spec.dtype.endswith("FNUZ"):
        return True
    return spec.dtype in ("U8", "I8", "I32") and len(spec.shape) > 1 and bool(_PACKED_OTHERWISE.search(spec.name))


def _refuse_lone_scales(plain: list[TensorSpec]) -> None:
    """A scale whose weight is no FP8 tensor means that one of the two was lost."""
    for spec in plain:
        if _LONE_SCALE.search(spec.name):
            raise InputError(f"{spec.file}: {spec.name!r} is a scale without an FP8 weight")
