"""The engines that fp8pack knows, in the order in which they are shown."""

from collections.abc import Sequence

from fp8pack.engines.comfyui import COMFYUI
from fp8pack.engines.cublaslt import CUBLASLT
from fp8pack.engines.engine import Engine
from fp8pack.engines.lmdeploy import LMDEPLOY
from fp8pack.engines.sglang import SGLANG
from fp8pack.engines.tensorrt_llm import TENSORRT_LLM
from fp8pack.engines.tgi import TGI
from fp8pack.engines.transformers import TRANSFORMERS
from fp8pack.engines.vllm import VLLM
from fp8pack.inputs import unknown

ENGINES: tuple[Engine, ...] = (VLLM, SGLANG, TENSORRT_LLM, TRANSFORMERS, TGI, LMDEPLOY, COMFYUI, CUBLASLT)
BY_ID = {engine.id: engine for engine in ENGINES}
NAMES = {engine.id: engine.name for engine in ENGINES}


_ALIASES = {"trtllm": "tensorrt-llm", "tensorrtllm": "tensorrt-llm", "trt-llm": "tensorrt-llm", "hf": "transformers"}


def parse_targets(texts: Sequence[str]) -> tuple[str, ...]:
    """Return engine ids, each with `==` and a version if the text has one; RecipeError if one is not known.

    Engines are named in any case and with `_` for `-`.
    """
    targets = []
    for text in texts:
        name, _, version = (part.strip() for part in text.lower().partition("=="))
        target = name.replace("_", "-")
        target = _ALIASES.get(target, target)
        if target not in NAMES:
            raise unknown("target", text, tuple(NAMES))
        newest = BY_ID[target].version.rpartition(" ")[2]
        if version and version not in (newest, *BY_ID[target].earlier):
            raise unknown(f"version of {NAMES[target]}", version, (newest, *BY_ID[target].earlier))
        targets.append(f"{target}=={version}" if version not in ("", newest) else target)
    return tuple(dict.fromkeys(targets))


def id_of(target: str) -> str:
    """Return the id of the engine that a target names."""
    return target.partition("==")[0]


def find_engine(target: str) -> Engine:
    """Return the engine that a target names, at the version that it names."""
    name, _, version = target.partition("==")
    return BY_ID[name].at(version)
