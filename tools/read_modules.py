"""Build each class of the installed transformers without weights, and write where its modules differ from its files.

    python tools/read_modules.py

The file is fp8pack/engines/data/transformers-VERSION-modules.json. A class is in it if a module that multiplies has
another name than in its files, is put together from several tensors or split, or is no plain linear.
"""

import json
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear
from transformers.models.auto import modeling_auto
from transformers.quantizers import AutoHfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import FineGrainedFP8Config

from fp8pack.engines.module_facts import find_modules, is_kept, one_number
from fp8pack.modelfacts.model import ModelFacts
from fp8pack.modelfacts.patterns import star
from fp8pack.modelfacts.roles import judge
from fp8pack.modelfacts.spec import TensorSpec

DATA = Path(__file__).parents[1] / "fp8pack" / "engines" / "data"
SCHEMA = 1
# Roles that fp8pack leaves out of the list of ignored modules.
UNLISTED = ("norm", "embedding", "bias", "rotary")
_WEIGHTS = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
_GROUP = {"targets": ["Linear"], "weights": _WEIGHTS}
_CHANNEL = {"config_groups": {"group_0": _GROUP}, "format": "float-quantized", "quantization_status": "compressed"}
QUANTIZED = {
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
    "compressed-tensors": {"quant_method": "compressed-tensors", **_CHANNEL},
}
_MERGES = {"MergeModulelist", "Concatenate"}
_ALIKE = 6  # how many tensors are looked at whose names differ in numbers alone
_ROUTERS = ("gate", "router")  # which are never packed
_NOT_LINEAR = (torch.nn.Embedding, torch.nn.modules.conv._ConvNd, torch.nn.LayerNorm)
Facts = dict[str, Any]


def classes() -> list[tuple[str, str]]:
    """Return each class that transformers builds, with each model type that it is built by."""
    tables = [name for name in dir(modeling_auto) if re.fullmatch(r"MODEL_\w*NAMES", name)]
    found = set()
    for table in tables:
        for model_type, names in getattr(modeling_auto, table).items():
            found |= {(name, model_type) for name in ([names] if isinstance(names, str) else names)}
    return sorted(found)


def read_class(model: Any) -> Facts:
    """Return the facts of a class, of a model on the meta device; the model is changed."""
    names: dict[str, list[str]] = {}
    lists: dict[str, set[str]] = {
        "converted": set(),
        "merged": set(),
        "fused": set(),
        "joined": set(),
        "linears": set(),
        "missed": set(),
    }
    renamings = get_model_conversion_mapping(model)
    shapes: dict[str, tuple[int, ...]] = {}
    for file, targets, operations, shape in _pairs(model):
        paths = [path for target in targets if _multiplies(model, path := target.rpartition(".")[0])]
        if not paths:
            continue
        name, is_experts = file.removesuffix(".weight"), _is_experts(paths[0])
        stem = star(name)
        if is_experts and len(shape) == 3:
            shapes[stem] = shape
        if not is_experts and not _is_listed([name, *paths], paths, renamings):
            lists["missed"].add(stem)
        modules = list(dict.fromkeys(star(path) for path in paths))
        if names.setdefault(stem, modules) != modules:
            names[one_number(name)] = modules
        if "MergeModulelist" in operations and set(operations) <= _MERGES:
            lists["merged"].add(stem)
        elif operations == ["Concatenate"]:
            lists["joined"].add(stem)
        elif operations or (len(shape) != 2 and not is_experts):
            lists["converted"].add(stem)
        elif is_experts:
            lists["fused"].add(stem)
        elif name == file or _role(file) in UNLISTED:
            lists["linears"].add(stem)
    reached = sorted({path for paths in names.values() for path in paths})
    wide = sorted({*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())})
    facts: Facts = {key: sorted(stems) for key, stems in lists.items()}
    facts["transposed"] = _transposed(shapes, model.config.get_text_config())
    facts |= {"unlike": _unlike(model), "names": shorten(names)}
    facts["wide"] = wide if any(is_kept(path, wide) for path in reached) else []
    facts["scale"] = _loses_scales(model)
    facts["refused"] = [method for method, config in QUANTIZED.items() if _refuses(model, config)]
    facts["unfit"] = _unfit(model)
    return {key: value for key, value in facts.items() if value}


def _is_listed(entries: list[str], paths: list[str], renamings: list[Any]) -> bool:
    """Say whether transformers keeps modules that are on the list of a checkpoint of FP8 blocks, as it renames that."""
    renamed = []
    for entry in entries:
        name = f"{entry}."
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        renamed.append(name.removesuffix("."))
    return not any(should_convert_module(path, renamed) for path in paths)


def _role(name: str) -> str:
    return judge(TensorSpec(name, "BF16", (16, 16), "", 0, 512), ModelFacts(), keeps_towers=False).role


def _loses_scales(model: Any) -> bool:
    """Say whether transformers takes parameters that are called `scale` for scales of weights, and loses them."""
    quantizer = AutoHfQuantizer.from_config(QUANTIZED["fp8"], pre_quantized=True)
    state = model.state_dict()
    files = {name: tensor for name, tensor in state.items() if name.endswith(".scale")}
    try:
        transforms = get_model_conversion_mapping(model, hf_quantizer=quantizer)
    except ValueError:  # which _refuses() tells
        return False
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    for file in revert_weight_conversion(model, files):
        target, _ = rename_source_key(file, renamings, [], model.base_model_prefix, state)
        if target not in state and file not in state:
            return True
    return False


def _transposed(shapes: dict[str, tuple[int, ...]], config: Any) -> list[str]:
    """The experts [E, K, N] in the files: K of down, and N of all else, is not the hidden size."""
    hidden, found = getattr(config, "hidden_size", 0), set()
    for stem, (_, rows, cols) in shapes.items():
        experts, _, leaf = stem.rpartition(".")
        if rows != cols and (rows if leaf != "down_proj" else cols) == hidden:
            found.add(experts)
    return sorted(found)


def _unlike(model: Any) -> dict[str, str]:
    """The modules that multiply and are no plain linear: whether they are a subclass of it."""
    return {
        star(path): "linear" if isinstance(module, torch.nn.Linear) else "other"
        for path, module in model.named_modules()
        if path.rpartition(".")[2] not in _ROUTERS
        and not _is_experts(path)
        and _multiplies(model, path)
        and type(module) is not torch.nn.Linear
    }


def _refuses(model: Any, config: dict[str, Any]) -> bool:
    """Say whether transformers fails to make the conversions of this class for scales beside the weights.

    It dequantizes compressed-tensors by the names of parameters, and stops at a buffer called `weight`.
    """
    stored = model.state_dict()
    is_buffer = any(name.endswith(".weight") and name in stored for name, _ in model.named_buffers())
    if is_buffer and config["quant_method"] == "compressed-tensors":
        return True
    for dequantize in (False, True):
        quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
        quantizer.validate_environment()
        quantizer.quantization_config.dequantize = dequantize  # which a machine without a GPU sets
        try:
            get_model_conversion_mapping(model, hf_quantizer=quantizer)
        except ValueError:
            return True
    return False


def _unfit(model: Any) -> list[str]:
    """The experts that transformers does not build in FP8, or with other shapes; the model is changed."""
    experts = {star(path): path for path, _ in model.named_modules() if _is_experts(path)}
    found = []
    for stem, path in experts.items():
        before = {name: weight.shape for name, weight in model.get_submodule(path).named_parameters()}
        holder = torch.nn.ModuleDict({"experts": model.get_submodule(path)})
        root = torch.nn.ModuleDict({"one": holder})
        root.config = model.config
        try:
            replace_with_fp8_linear(root, quantization_config=FineGrainedFP8Config(), pre_quantized=True)
        except Exception:  # whatever a class raises that FP8Experts was not made for
            found.append(stem)
            continue
        after = {name: weight.shape for name, weight in root["one"]["experts"].named_parameters()}
        if any(after.get(name) != shape for name, shape in before.items()):
            found.append(stem)
    return sorted(found)


def _pairs(model: Any) -> Iterator[tuple[str, list[str], list[str], tuple[int, ...]]]:
    """Each tensor of a file with two dimensions or more: the parameters it is loaded into, and by which operations."""
    state = model.state_dict()
    transforms = get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    by_source = {source: each for each in converters for source in each.source_patterns}
    seen: Counter[str] = Counter()
    for file, tensor in revert_weight_conversion(model, dict(state)).items():
        seen[star(file)] += 1
        if tensor.dim() < 2 or seen[star(file)] > _ALIKE:
            continue
        target, source = rename_source_key(file, renamings, converters, model.base_model_prefix, state)
        if source is None:
            yield file, [target], [], tuple(tensor.shape)
            continue
        converter = by_source[source]
        first, *others = converter.target_patterns
        targets = [target, *(target.replace(first, other) for other in others)]
        operations = [type(operation).__name__ for operation in converter.operations]
        yield file, [each for each in targets if each in state], operations, tuple(tensor.shape)


def _multiplies(model: Any, path: str) -> bool:
    module = model.get_submodule(path)
    if _is_experts(path):
        return True
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.nn.Parameter) and weight.dim() == 2 and not isinstance(module, _NOT_LINEAR)


def _is_experts(path: str) -> bool:
    return path == "experts" or path.endswith(".experts")


def shorten(names: dict[str, list[str]]) -> dict[str, list[str]]:
    """Return the shortest prefixes by which find_modules() knows the modules of every tensor."""
    short: dict[str, list[str]] = {}
    for stem, paths in sorted(names.items()):
        parts = stem.split(".") if find_modules(stem, {}) != paths else []
        for count in range(1, len(parts) + 1):
            prefix, suffix = ".".join(parts[:count]), "".join(f".{part}" for part in parts[count:])
            heads = [path.removesuffix(suffix) for path in paths if path.endswith(suffix)]
            if len(heads) == len(paths) and heads != [prefix] and _tells(prefix, heads, names):
                short[prefix] = heads
                break
    return short | {stem: paths for stem, paths in names.items() if find_modules(stem, short) != paths}


def _tells(prefix: str, heads: list[str], names: dict[str, list[str]]) -> bool:
    """Say whether a prefix tells the modules of every tensor that has it."""
    return all(
        paths == [head + stem.removeprefix(prefix) for head in heads]
        for stem, paths in names.items()
        if stem == prefix or stem.startswith(f"{prefix}.")
    )


def _build(cls: Any, model_type: str) -> Any:
    """Build a class by its default configuration, or by that of another model type."""
    if model_type == cls.config_class.model_type:
        try:
            return cls(cls.config_class())
        except Exception:  # whatever a class raises without values of its own
            pass
    return cls(transformers.AutoConfig.for_model(model_type))


def _read(name: str, model_type: str) -> tuple[str, Facts | str]:
    """Return the facts of a class, or why it could not be built: it wants a package, or values of its own.

    The key is the class, and the model type if it is another than that of the class.
    """
    key = name
    try:
        cls = getattr(transformers, name)
        if model_type != cls.config_class.model_type:
            key = f"{name} {model_type}"
        with torch.device("meta"):
            return key, read_class(_build(cls, model_type))
    except Exception as error:  # whatever a class raises
        return key, f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


def main() -> None:
    """Write the file, and print which classes could not be built."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    with get_context("fork").Pool() as pool:
        read = dict(pool.starmap(_read, classes(), chunksize=8))
    failed = {key: why for key, why in read.items() if isinstance(why, str)}
    usual = {key: read.get(key.partition(" ")[0], {}) if " " in key else {} for key in read}
    found = {key: facts for key, facts in read.items() if key not in failed and facts != usual[key]}
    built = len(read) - len(failed)
    print("\n".join(f"{name}: {why}" for name, why in failed.items()))
    head = {"schema": SCHEMA, "engine": "transformers", "version": transformers.__version__, "built": built}
    entries = {name: json.dumps(facts, separators=(",", ":")) for name, facts in found.items()}
    lines = ",\n".join(f"  {json.dumps(name)}: {entry}" for name, entry in entries.items())
    text = json.dumps(head, indent=1).removesuffix("\n}") + ',\n "classes": {\n' + lines + "\n }\n}\n"
    path = DATA / f"transformers-{transformers.__version__}-modules.json"
    path.write_text(text, encoding="utf-8")
    print(f"{path.name}: {len(found)} of {built} classes, {len(failed)} not built, {len(text)} bytes")


if __name__ == "__main__":
    main()
