"""Read an engine's wheel or source tree, and write what its code says of models into fp8pack/engines/data/.

    python tools/read_engines.py vllm-0.33.0-cp38-abi3-manylinux_2_28_x86_64.whl
    python tools/read_engines.py text-generation-inference/ --engine tgi --version 3.3.7

Nothing of the engine is imported: its files are parsed (`ast`), and what they leave open is written as unknown. The
same input gives the same bytes, so that a new version of an engine shows as a diff.
"""

import argparse
import ast
import json
import re
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from class_graph import Graph, Origin, literal, partial_dict

DATA = Path(__file__).parents[1] / "fp8pack" / "engines" / "data"
SCHEMA = 1
# Linear layers of vLLM, and of SGLang, which began as a copy of them.
LINEARS = frozenset(
    (
        *("ReplicatedLinear", "ColumnParallelLinear", "RowParallelLinear", "QKVParallelLinear", "ParallelLMHead"),
        *("MergedReplicatedLinear", "MergedColumnParallelLinear"),
    )
)
Facts = dict[str, Any]


def read_vllm(files: dict[str, str]) -> Facts:
    """Return the facts of vLLM: the tables of its registry, and what each class builds and loads."""
    graph = Graph(files)
    registry = graph.modules["vllm.model_executor.models.registry"]
    tables = {name: node for name, node in registry.values.items() if re.fullmatch(r"_[A-Z_]+_MODELS", name)}
    removed = partial_dict(tables.pop("_PREVIOUSLY_SUPPORTED_MODELS"))
    for other in ("_OOT_SUPPORTED_MODELS", "_VLLM_MODELS", "_TRANSFORMERS_BACKEND_MODELS"):
        tables.pop(other, None)
    classes = {}
    for name in sorted(tables):
        for architecture, (module, cls) in partial_dict(tables[name]).items():
            path = module if module.startswith("vllm.") else f"vllm.model_executor.models.{module}"
            classes[architecture] = _class_facts(graph, graph.origin(path, cls), ("AutoWeightsLoader", _REMAP))
    return {"falls_back": True, "removed": removed, "classes": classes}


def read_sglang(files: dict[str, str]) -> Facts:
    """Return the facts of SGLang: the EntryClass of each file of models."""
    graph = Graph(files)
    classes = {}
    for name, module in sorted(graph.modules.items()):
        entry = module.values.get("EntryClass") if name.startswith("sglang.srt.models.") else None
        for node in entry.elts if isinstance(entry, ast.List | ast.Tuple) else [entry] if entry else []:
            if isinstance(node, ast.Name):
                classes[node.id] = _class_facts(graph, graph.origin(name, node.id), (_REMAP,))
    return {"falls_back": True, "removed": {}, "classes": classes}


def read_lmdeploy(files: dict[str, str]) -> Facts:
    """Return the facts of LMDeploy: the architectures of its two engines."""
    turbomind = ast.parse(files["lmdeploy.turbomind.supported_models"])
    names = {
        keyword.arg
        for node in ast.walk(turbomind)
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "SUPPORTED_ARCHS"
        for keyword in getattr(node.value, "keywords", [])
    }
    for node in ast.walk(ast.parse(files["lmdeploy.pytorch.models.module_map"])):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "update":
            of_cuda = getattr(getattr(node.func, "value", None), "id", "") == "MODULE_MAP"
            keys = [literal(key) for key in node.args[0].keys] if of_cuda and isinstance(node.args[0], ast.Dict) else []
            names |= {key for key in keys if isinstance(key, str)}
    return {"falls_back": False, "removed": {}, "classes": {name: {} for name in sorted(filter(None, names))}}


def read_tgi(files: dict[str, str]) -> Facts:
    """Return the facts of TGI: the model types that its server knows; any other goes to transformers."""
    models = ast.parse(files["server.text_generation_server.models"])
    table = next(node for node in ast.walk(models) if isinstance(node, ast.ClassDef) and node.name == "ModelType")
    types = {
        found["type"]
        for node in table.body
        if isinstance(node, ast.Assign) and isinstance(found := literal(node.value), dict)
    }
    return {"falls_back": True, "removed": {}, "model_types": sorted(types), "classes": {}}


def read_transformers(files: dict[str, str]) -> Facts:
    """Return the facts of transformers: the classes of its modeling files, and the heads that each ties."""
    graph = Graph(files)
    classes = {}
    for name, module in graph.modules.items():
        if re.fullmatch(r"transformers\.models\.\w+\.modeling_\w+", name):
            for cls in module.classes:
                if re.search(r"(For[A-Z]\w+|Model|Head)$", cls) and not cls.endswith(
                    ("PreTrainedModel", "PretrainedModel")
                ):
                    tied = _tied_heads(graph, Origin(name, cls))
                    classes[cls] = {"tied": tied} if tied else {}
    return {"falls_back": True, "removed": {}, "classes": classes}


def _tied_heads(graph: Graph, origin: Origin) -> list[str]:
    """The modules whose weight is that of an embedding, which a checkpoint leaves out: no embeddings themselves."""
    found = partial_dict(graph.attribute(origin, "_tied_weights_keys"))
    pairs = {key.removesuffix(".weight"): value for key, value in found.items() if key.endswith(".weight")}
    return sorted(
        key for key, value in pairs.items() if re.fullmatch(r"[\w.]+", key) and "embed" not in key.split(".")[-1]
    )


def read_tensorrt_llm(files: dict[str, str]) -> Facts:
    """Return the facts of TensorRT-LLM: the index of its PyTorch models."""
    values = Graph(files).modules["tensorrt_llm._torch.models._arch_index"].values
    names = partial_dict(values["MODEL_ARCH_TO_MODULE"])
    return {"falls_back": False, "removed": {}, "classes": {name: {} for name in names}}


_REMAP = "maybe_remap_kv_scale_name"
_ENGINES: dict[str, tuple[Callable[[dict[str, str]], Facts], tuple[str, ...]]] = {
    "vllm": (read_vllm, ("vllm/model_executor/models/", "vllm/models/", "vllm/model_executor/layers/mamba/")),
    "sglang": (read_sglang, ("sglang/srt/models/", "sglang/srt/layers/attention/")),
    "lmdeploy": (read_lmdeploy, ("lmdeploy/turbomind/supported_models", "lmdeploy/pytorch/models/module_map")),
    "tensorrt-llm": (read_tensorrt_llm, ("tensorrt_llm/_torch/models/_arch_index",)),
    "tgi": (read_tgi, ("server/text_generation_server/models/__init__",)),
    "transformers": (read_transformers, ("transformers/models/",)),
}


def _class_facts(graph: Graph, origin: Origin, loads_scales: tuple[str, ...]) -> Facts:
    """What a class builds without a quantization config, fuses, and does with scales of K and V."""
    if graph.find(origin) is None:
        return {"unknown": ["*"]}  # another package's, or made by a function
    states: dict[str, set[bool | None]] = defaultdict(set)
    fused: dict[str, list[str]] = {}
    merged: dict[str, int] = {}
    names: set[str] = set()
    for each in graph.reachable(origin):
        for linear in graph.linears(each, LINEARS):
            states[linear.leaf].add(linear.quantized)
            merged[linear.leaf] = max(merged.get(linear.leaf, 1), linear.parts)
        for key, parts in graph.fused(each).items():
            fused.setdefault(key, parts)
        names |= graph.names(each)
    unquantized = sorted(leaf for leaf, found in states.items() if leaf and found == {False})
    unknown = sorted(leaf for leaf, found in states.items() if leaf and None in found and True not in found)
    found = {"unquantized": unquantized, "unknown": unknown, "fused": {key: fused[key] for key in sorted(fused)}}
    found["merged"] = {
        leaf: count for leaf, count in sorted(merged.items()) if count > 1 and leaf not in fused and leaf
    }
    facts: Facts = {key: value for key, value in found.items() if value}
    return {**facts, "kv_scales": any(name in names for name in loads_scales)}


def read_files(place: Path, below: tuple[str, ...]) -> dict[str, str]:
    """Return the text of each Python file below some folders of a wheel or a directory, by the name of its module."""
    return dict(sorted((_module_of(name), text) for name, text in _texts(place, below)))


def _texts(place: Path, below: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    if place.is_dir():
        for path in place.rglob("*.py"):
            name = path.relative_to(place).as_posix()
            if name.startswith(below):
                yield name, path.read_text(encoding="utf-8")
        return
    with zipfile.ZipFile(place) as wheel:
        for name in wheel.namelist():
            if name.endswith(".py") and name.startswith(below):
                yield name, wheel.read(name).decode("utf-8")


def _module_of(name: str) -> str:
    return name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def text_of(engine: str, version: str, facts: Facts) -> str:
    """Return the JSON of a data file: a line for each class."""
    head = {"schema": SCHEMA, "engine": engine, "version": version, **facts, "classes": None}
    classes = ",\n".join(
        f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in sorted(facts["classes"].items())
    )
    body = json.dumps(head, indent=1)
    return body.replace('"classes": null', '"classes": {\n' + classes + ("\n }" if classes else "}")) + "\n"


def main() -> None:
    """Read one engine and write its data file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("place", type=Path, help="a wheel, or the directory that has the package in it")
    parser.add_argument("--engine", choices=sorted(_ENGINES), help="default: from the name of the wheel")
    parser.add_argument("--version", help="default: from the name of the wheel")
    parser.add_argument("--output", type=Path, default=DATA, help="directory of the data file")
    given = parser.parse_args()
    wheel = re.match(r"([A-Za-z_]+)-([\w.]+)-", given.place.name)
    engine = given.engine or (wheel[1].removesuffix("_cpu") if wheel else "")
    version = given.version or (wheel[2] if wheel else "")
    if engine not in _ENGINES or not version:
        parser.error("name the engine and its version: --engine, --version")
    read, below = _ENGINES[engine]
    text = text_of(engine, version, read(read_files(given.place, below)))
    given.output.mkdir(exist_ok=True)
    path = given.output / f"{engine}-{version}.json"
    path.write_text(text, encoding="utf-8")
    print(f"{path.name}: {len(json.loads(text)['classes'])} classes, {len(text)} bytes")


if __name__ == "__main__":
    main()
