"""Models and storages to ask the rules of the engines about."""

from dataclasses import replace
from typing import Any

from fp8pack.engines.case import make_case
from fp8pack.engines.judge import EngineVerdict, judge_engines
from fp8pack.engines.known import ENGINES, NAMES
from fp8pack.modelfacts.model import ModelFacts
from fp8pack.modelfacts.spec import TensorSpec
from fp8pack.modelfacts.storage import Storage
from fp8pack.numerics.formats import E4M3
from fp8pack.numerics.granularity import parse_granularity

QWEN = ModelFacts("Qwen2ForCausalLM", "qwen2", num_layers=1, head_dim=128, num_heads=32, num_kv_heads=8)
LLAMA = replace(QWEN, architecture="LlamaForCausalLM", model_type="llama")
LLM_ENGINES = tuple(engine.id for engine in ENGINES if engine.is_for_language_models)
LAYER = "model.layers.0"
ROLES = {"q_proj": "attn.q", "k_proj": "attn.k", "v_proj": "attn.v", "o_proj": "attn.o"}
ROLES |= {"q_a_proj": "attn.q", "kv_a_proj_with_mqa": "attn.kv"}
ROLES |= {"gate_proj": "mlp.gate", "up_proj": "mlp.up", "down_proj": "mlp.down"}
Packed = list[tuple[TensorSpec, str]]


def weight(name: str, n: int, k: int, role: str = "") -> tuple[TensorSpec, str]:
    """An FP8 weight [N, K] and its role, by its leaf unless it is given."""
    found = role or ROLES[name.rsplit(".", 1)[-1]]
    if ".experts." in name:
        found = found.replace("mlp", "expert")
    return TensorSpec(f"{name}.weight", "BF16", (n, k), "model.safetensors", 0, 2 * n * k), found


def dense(hidden: int = 4096, kv: int = 1024, intermediate: int = 14336) -> Packed:
    attention, mlp = f"{LAYER}.self_attn", f"{LAYER}.mlp"
    return [
        *(weight(f"{attention}.{leaf}_proj", n, hidden) for leaf, n in (("q", hidden), ("k", kv), ("v", kv))),
        weight(f"{attention}.o_proj", hidden, hidden),
        *(weight(f"{mlp}.{leaf}_proj", intermediate, hidden) for leaf in ("gate", "up")),
        weight(f"{mlp}.down_proj", hidden, intermediate),
    ]


def experts(intermediate: int = 768, hidden: int = 2048) -> Packed:
    parent = f"{LAYER}.mlp.experts"
    return [
        pair
        for i in range(2)
        for pair in (
            *(weight(f"{parent}.{i}.{leaf}_proj", intermediate, hidden) for leaf in ("gate", "up")),
            weight(f"{parent}.{i}.down_proj", hidden, intermediate),
        )
    ]


def storage(kind: str, **changes: Any) -> Storage:
    """The storage of `method[/spelling] granularity activations`."""
    spelled, granularity, activations = kind.split()
    method, _, spelling = spelled.partition("/")
    return replace(Storage(method, E4M3, parse_granularity(granularity), activations, spelling=spelling), **changes)


BLOCK, DYNAMIC = storage("fp8 block:128x128 dynamic"), storage("compressed-tensors channel dynamic")


def judge(
    kind: str | Storage, engine: str, packed: Packed | None = None, facts: ModelFacts = QWEN, **where: Any
) -> EngineVerdict:
    stored = storage(kind) if isinstance(kind, str) else kind
    verdicts = judge_engines(make_case(stored, dense() if packed is None else packed, facts, **where))
    assert [verdict.engine for verdict in verdicts] == list(NAMES)
    return next(verdict for verdict in verdicts if verdict.engine == engine)


LLM = "vllm sglang tensorrt-llm transformers tgi"
READ_BY = {
    "fp8 block:128x128 dynamic": f"{LLM} lmdeploy cublaslt",
    "fp8 block:128x128 static": "cublaslt",
    "fp8 tensor dynamic": "vllm sglang tgi cublaslt",
    "fp8 tensor static": "vllm sglang tgi cublaslt",
    "fp8/transformers tensor dynamic": "transformers cublaslt",
    "fp8/transformers tensor static": "transformers cublaslt",
    "compressed-tensors tensor dynamic": "vllm sglang transformers tgi cublaslt",
    "compressed-tensors tensor static": "vllm sglang transformers tgi cublaslt",
    "compressed-tensors tensor none": "vllm sglang transformers",
    "compressed-tensors channel dynamic": f"{LLM} cublaslt",
    "compressed-tensors channel static": "vllm sglang transformers cublaslt",
    "compressed-tensors channel none": "vllm sglang transformers",
    "compressed-tensors block:128x128 dynamic": "vllm sglang tensorrt-llm transformers cublaslt",
    "compressed-tensors block:128x128 static": "transformers cublaslt",
    "compressed-tensors block:128x128 none": "vllm sglang transformers",
    "compressed-tensors group:64 dynamic": "transformers",
    "compressed-tensors mx dynamic": "vllm transformers cublaslt",
    "compressed-tensors mx none": "vllm transformers",
    "modelopt tensor static": "vllm sglang tensorrt-llm cublaslt",
    "modelopt channel dynamic": "vllm tensorrt-llm cublaslt",
    "modelopt block:128x128 dynamic": "vllm tensorrt-llm cublaslt",
    "modelopt mx dynamic": "vllm sglang tensorrt-llm cublaslt",
    "mxfp8 mx dynamic": "sglang tensorrt-llm transformers cublaslt",
    "torchao tensor dynamic": "vllm transformers cublaslt",
    "torchao channel none": "vllm transformers",
    "quark tensor static": "vllm sglang transformers cublaslt",
    "quark channel dynamic": "vllm sglang transformers cublaslt",
    "quark block:128x128 dynamic": "vllm transformers cublaslt",
    "quark mx dynamic": "vllm transformers cublaslt",
    "comfyui tensor dynamic": "comfyui cublaslt",
    "comfyui-scaled tensor none": "comfyui",
    "comfyui mx dynamic": "comfyui cublaslt",
    "fbgemm_fp8 channel dynamic": "vllm transformers tgi cublaslt",
    "auto-round block:128x128 dynamic": "vllm cublaslt",
    "auto-round mx dynamic": "vllm cublaslt",
    "w8a8_fp8 channel dynamic": "sglang cublaslt",
    "fp8pack tensor dynamic": "cublaslt",
    "fp8pack group:64 dynamic": "",
}


UP = f"{LAYER}.mlp.up_proj"
