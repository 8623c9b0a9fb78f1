"""The engines that fp8pack knows, in the order in which it speaks of them."""

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
from fp8pack.errors import RecipeError

ENGINES: tuple[Engine, ...] = (VLLM, SGLANG, TENSORRT_LLM, TRANSFORMERS, TGI, LMDEPLOY, COMFYUI, CUBLASLT)
BY_ID = {engine.id: engine for engine in ENGINES}
NAMES = {engine.id: engine.name for engine in ENGINES}


def parse_targets(texts: Sequence[str]) -> tuple[str, ...]:
    """Return engine names, in any case and with `_` for `-`."""
    targets = tuple(text.lower().replace("_", "-") for text in texts)
    targets = tuple("tensorrt-llm" if target == "trtllm" else target for target in targets)
    for text, target in zip(texts, targets, strict=True):
        if target not in NAMES:
            raise RecipeError(f"--target {text!r} is not known: choose {', '.join(NAMES)}")
    return targets
