"""How a checkpoint declares its quantization: in config.json, in files beside it, in headers and markers."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from math import prod
from typing import Any

from fp8pack.checkpoint.source import Source, read_json
from fp8pack.errors import RecipeError
from fp8pack.numerics.granularity import BLOCK_128, MX, Granularity, parse_granularity

_MARKERS = ("comfy_quant", "scaled_fp8")
_MAX_MARKER_NBYTES = 4096
_IGNORE_KEYS = ("ignore", "modules_to_not_convert", "ignored_layers", "exclude_modules", "exclude", "ignored_modules")
_MAX_ENTRIES, _MAX_ENTRY, _MAX_REPEATS = 4096, 512, 3
_REPEAT, _NESTED = re.compile(r"[*+{]"), re.compile(r"\)[*+{?]|\\\d")
_REGION_KEYS = ("weight_block_size", "block_structure", "block_size", "group_size")


@dataclass(frozen=True, slots=True)
class Announcement:
    """The declaration of quantized weights, for what names, dtypes and shapes do not show.

    method: `quant_method`, or the name of a method without one; empty if none is declared. markers: tensors that
    declare something, and are no weights. regions: scale regions of weights in the configuration, in its order. tiled:
    modules whose exponents are in the order of numerics/swizzle.py. weight_only: activations are not quantized.
    ignored: the ignore entries, in any syntax. bits: those of elements. asymmetric: every integer has a zero point.
    rotated: the inputs of weights are transformed while the model runs, as by Hadamard matrices.
    """

    method: str
    markers: frozenset[str]
    regions: tuple[Granularity, ...]
    tiled: frozenset[str]
    weight_only: bool
    powers_of_two: bool
    ignored: tuple[str, ...]
    bits: tuple[int, ...] = ()
    asymmetric: bool = False
    rotated: bool = False


def read_announcement(source: Source) -> Announcement:
    """Return what a checkpoint declares, read where engines read it."""
    markers = frozenset(spec.name for spec in source.specs if spec.name.rpartition(".")[2] in _MARKERS)
    config = _find_config(source, markers)
    return Announcement(
        str(config.get("quant_method", "")).lower(),
        markers,
        tuple(_regions(config)),
        _tiled_modules(source, markers),
        _is_weight_only(source, config, markers),
        config.get("scale_fmt") == "ue8m0",
        _ignored(config),
        tuple(value for key, value in _walk(config, 0) if key == "num_bits" and isinstance(value, int)),
        {value for key, value in _walk(config, 0) if key == "symmetric"} == {False},
        bool(config.get("transform_config")),
    )


def plain_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the free text of a header without the keys of quant methods."""
    own = ("tensor_names", "_quantization_metadata", "quant_format")
    return {key: text for key, text in metadata.items() if key not in own and '"_type"' not in text}


def _find_config(source: Source, markers: frozenset[str]) -> dict[str, Any]:
    """The declaration, with `quant_method`: in config.json or a section of it, in a file of its own, in headers."""
    config = source.config or {}
    for section in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in ("quantization_config", "compression_config"):
            found = section.get(key)
            if isinstance(found, dict) and found:
                return {"quant_method": "compressed-tensors", **found}
    if source.is_single_file:
        return _from_headers(source, markers)
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
    return _from_headers(source, markers)


def _from_headers(source: Source, markers: frozenset[str]) -> dict[str, Any]:
    if any("tensor_names" in file.metadata for file in source.files):
        return {"quant_method": "torchao"}
    if any("_quantization_metadata" in file.metadata for file in source.files):
        return {"quant_method": "comfyui"}
    if any(name.endswith("comfy_quant") for name in markers):
        return {"quant_method": "comfyui"}
    return {"quant_method": "comfyui-scaled"} if markers else {}


def _tiled_modules(source: Source, markers: frozenset[str]) -> frozenset[str]:
    """The modules with tiled exponents: all of ComfyUI, those of torchao with such metadata."""
    tiled = {marker.removesuffix(".comfy_quant") for marker in markers}
    for file in source.files:
        if layers := _parse(file.metadata.get("_quantization_metadata")).get("layers"):
            tiled.update(layers if isinstance(layers, dict) else ())
        for name, text in file.metadata.items():
            if "is_swizzled_scales" in text:
                data = _parse(text).get("_data")
                if isinstance(data, dict) and data.get("is_swizzled_scales") is True:
                    tiled.add(name.removesuffix(".weight"))
    return frozenset(tiled)


def _regions(config: dict[str, Any]) -> list[Granularity]:
    """Every scale region of weights in a configuration, under any key, in its order."""
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
    """The entries of a document, except those of activations."""
    if depth < 8 and isinstance(value, dict):
        for key, inner in value.items():
            if not key.startswith(("act_", "input_", "output_", "kv_cache_")):
                yield key, inner
                yield from _walk(inner, depth + 1)


def _ignored(config: dict[str, Any]) -> tuple[str, ...]:
    """The ignored modules, without entries that would be slow to match with thousands of names."""
    found: list[Any] = next((config[key] for key in _IGNORE_KEYS if isinstance(config.get(key), list)), [])
    return tuple(entry for entry in found[:_MAX_ENTRIES] if isinstance(entry, str) and _is_cheap(entry))


def _is_cheap(entry: str) -> bool:
    """Whether it is a short name or glob, or a regular expression without nested repetition."""
    is_expression = entry.startswith("re:")
    repeats = len(_REPEAT.findall(entry)) if is_expression else entry.count("*")
    return len(entry) <= _MAX_ENTRY and repeats <= _MAX_REPEATS and not (is_expression and _NESTED.search(entry))


def _is_weight_only(source: Source, config: dict[str, Any], markers: frozenset[str]) -> bool:
    match config:
        case {"config_groups": dict(groups)} if groups:  # compressed-tensors, ModelOpt
            return all(isinstance(g, dict) and g.get("input_activations") is None for g in groups.values())
        case {"global_quant_config": {"weight": dict(), "input_tensors": inputs}}:  # Quark
            return inputs is None
        case {"quant_type": {"default": {"_type": str(kind)}}}:  # torchao
            return "WeightOnly" in kind
    return config.get("activation_scheme") == "none" or _wants_full_precision(source, markers)


def _wants_full_precision(source: Source, markers: frozenset[str]) -> bool:
    """Whether ComfyUI's markers ask for GEMMs in full precision: JSON in the new ones, two elements in the old."""
    for spec in (spec for spec in source.specs if spec.name in markers):
        if spec.name.endswith("scaled_fp8"):
            return prod(spec.shape) == 2
        if spec.nbytes <= _MAX_MARKER_NBYTES:
            with closing(source.open_file(spec.file)) as opened:
                text = bytearray(spec.nbytes)
                opened.readinto(memoryview(text), spec.begin)
            return _parse(text.decode(errors="replace")).get("full_precision_matrix_mult") is True
    return False


def _parse(text: str | None) -> dict[str, Any]:
    try:
        document = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}
