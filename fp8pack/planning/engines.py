"""What each inference engine demands of a checkpoint, as values; first form.

Read in the engines' code: vLLM 0.33, SGLang 0.5.23, TensorRT-LLM 008e0af, transformers 5.23, text-generation-inference
05d0aa6, LMDeploy 02f556b. docs/format.md lists the sources rule by rule. Nothing here was run against an engine.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from fp8pack.errors import RecipeError
from fp8pack.numerics.granularity import BLOCK_128, CHANNEL, MX, TENSOR, Granularity
from fp8pack.planning.model import ModelFacts
from fp8pack.planning.policy import fused_module
from fp8pack.planning.recipe import FP8, FP8_BLOCK, FP8_DYNAMIC, Request, Scheme, parse_scheme
from fp8pack.planning.spec import TensorSpec
from fp8pack.planning.storage import Storage

Packed = Sequence[tuple[TensorSpec, str]]

NAMES = {
    "vllm": "vLLM",
    "sglang": "SGLang",
    "tensorrt-llm": "TensorRT-LLM",
    "transformers": "transformers",
    "tgi": "TGI",
    "lmdeploy": "LMDeploy",
}
TP_SIZES = (1, 2, 4, 8)
LARGE_NBYTES = 16 * 10**9  # a model above this is served on several GPUs
GEMM_MULTIPLE = 16  # cuBLASLt and CUTLASS FP8 kernels want N and K in multiples of 16

# (quant method, granularity, activations) -> engines that load it, with what they need besides.
_LOADS: dict[tuple[str, str, str], dict[str, str]] = {
    ("fp8", BLOCK_128.name, "dynamic"): dict.fromkeys(NAMES, "") | {"transformers": "with accelerate"},
    ("fp8", TENSOR.name, "dynamic"): {"vllm": "", "sglang": "", "tgi": ""},
    ("compressed-tensors", CHANNEL.name, "dynamic"): {
        "vllm": "",
        "sglang": "",
        "tensorrt-llm": "",
        "transformers": "with compressed-tensors",
        "tgi": "",
    },
    ("modelopt", TENSOR.name, "static"): {"vllm": "", "sglang": "", "tensorrt-llm": ""},
    ("compressed-tensors", TENSOR.name, "static"): {
        "vllm": "",
        "sglang": "",
        "transformers": "with compressed-tensors",
        "tgi": "",
    },
    ("compressed-tensors", CHANNEL.name, "none"): {"vllm": "", "sglang": "", "transformers": "with compressed-tensors"},
    ("compressed-tensors", MX.name, "dynamic"): {"vllm": "", "transformers": "with compressed-tensors"},
}
_WHY_NOT = {
    ("fp8", TENSOR.name): {
        "transformers": ("it looks for weight_scale_inv", "--scheme FP8_DYNAMIC"),
        "tensorrt-llm": ("quant_method fp8 means block scales there", "--scheme FP8_BLOCK"),
        "lmdeploy": ("it would use the weight without its scale", "--scheme FP8_BLOCK"),
    },
    ("modelopt", TENSOR.name): {
        "transformers": ("it has no reader for modelopt", "--quant-method compressed-tensors"),
        "tgi": ("it has no reader for modelopt", "--quant-method compressed-tensors"),
    },
    ("compressed-tensors", TENSOR.name): {
        "tensorrt-llm": ("it refuses tensor scales there", "--quant-method modelopt"),
    },
}

# Loaders that rename weight_scale_inv to weight_scale and then miss the block scales.
_LOSES_BLOCK_SCALES = {
    "sglang": {
        "LlamaForCausalLM": "Llama",
        "MistralForCausalLM": "Mistral",
        "Ministral3ForCausalLM": "Ministral",
        "Phi3ForCausalLM": "Phi3",
        "InternLM3ForCausalLM": "InternLM3",
        "TeleFLMForCausalLM": "TeleFLM",
    },
    "vllm": {"Mistral3ForConditionalGeneration": "Mistral3"},
}


@dataclass(frozen=True, slots=True)
class EngineVerdict:
    """Whether an engine loads the output: the tensor-parallel sizes that it loads at, or the reason and the remedy."""

    engine: str
    tp: tuple[int, ...]
    note: str = ""
    reason: str = ""
    remedy: str = ""


def parse_targets(texts: Sequence[str]) -> tuple[str, ...]:
    """Return engine names, in any case and with `_` for `-`."""
    targets = tuple(text.lower().replace("_", "-").replace("trtllm", "tensorrt-llm") for text in texts)
    for text, target in zip(texts, targets, strict=True):
        if target not in NAMES:
            raise RecipeError(f"--target {text!r} is not known: choose {', '.join(NAMES)}")
    return targets


def choose_scheme(request: Request, packed: Packed, facts: ModelFacts) -> tuple[Scheme, str]:
    """Return the scheme and the fact that decided it; block scales unless something speaks against them."""
    named = parse_scheme(request.scheme)
    if named is not None:
        return named, "asked for"
    if request.activations == "static" or (request.calibration and not request.kv_cache):
        return FP8, "auto: the calibration gives static activation scales"
    if ragged := next((spec for spec, _ in packed if not BLOCK_128.fits(spec.shape)), None):
        n, k = ragged.shape
        return FP8_DYNAMIC, f"auto: {ragged.name} is {n} x {k}, no multiple of 128"
    sizes: tuple[int, ...] = (request.tp,) if request.tp else ()
    if not sizes and sum(spec.nbytes for spec, _ in packed) > LARGE_NBYTES:
        sizes = TP_SIZES[1:]
    for tp in sizes:
        if problem := tp_problem(packed, BLOCK_128, tp, facts):
            return FP8_DYNAMIC, f"auto: {problem}"
    for engine, architectures in _LOSES_BLOCK_SCALES.items():
        if facts.architecture in architectures and (not request.targets or engine in request.targets):
            return FP8_DYNAMIC, f"auto: {NAMES[engine]}'s {architectures[facts.architecture]} loader loses block scales"
    return FP8_BLOCK, "auto: every packed dimension is a multiple of 128"


def tp_problem(packed: Packed, granularity: Granularity, tp: int, facts: ModelFacts) -> str | None:
    """Return the first weight whose part on one of `tp` GPUs does not hold whole scale regions, in words.

    q/k/v, gate/up are cut along N, o and down along K; with fewer key heads than GPUs, k and v are replicated.
    """
    heads, kv_heads = facts.num_heads, facts.num_kv_heads
    if heads % tp or (kv_heads and kv_heads % tp and tp % kv_heads):
        return f"{heads} attention heads with {kv_heads} key heads do not spread over {tp} GPUs"
    rows = granularity.rows if granularity.rows and granularity.rows > 1 else GEMM_MULTIPLE
    cols = max(granularity.cols or GEMM_MULTIPLE, GEMM_MULTIPLE)
    for spec, role in packed:
        n, k = spec.shape
        parts = tp
        if role in ("attn.k", "attn.v") and facts.num_kv_heads and facts.head_dim:
            parts = min(tp, facts.num_kv_heads)
        if role.startswith("attn.o") or role.endswith(".down"):
            if k % tp or (k // tp) % cols:
                return f"{spec.name} has K = {k}, and {k} / {tp} is no multiple of {cols}"
        elif (fused_module(spec.name) or role.startswith(("attn", "mlp", "expert"))) and (
            n % parts or (n // parts) % rows
        ):
            return f"{spec.name} has N = {n}, and {n} / {parts} is no multiple of {rows}"
    return None


def judge_engines(
    storage: Storage, packed: Packed, facts: ModelFacts, *, tp: int | None = None, gpu: str | None = None
) -> tuple[EngineVerdict, ...]:
    """Return a verdict for every engine.

    packed: the FP8 weights [N, K] and their roles. tp, gpu: what it must load at, by default the usual sizes, any GPU.
    """
    sizes = (tp,) if tp else TP_SIZES
    problems = {tp: tp_problem(packed, storage.granularity, tp, facts) for tp in sizes}
    return tuple(_judge(engine, storage, facts, problems) for engine in NAMES)


def check_targets(verdicts: Sequence[EngineVerdict], storage: Storage, targets: Sequence[str]) -> None:
    """Raise RecipeError if an engine named by --target cannot load the output."""
    for verdict in verdicts:
        if verdict.engine in targets and not verdict.tp:
            remedy = f": use {verdict.remedy}" if verdict.remedy else ""
            raise RecipeError(
                f"{NAMES[verdict.engine]} cannot load {storage.granularity} scales in {storage.quant_method}: "
                f"{verdict.reason}{remedy}"
            )


def _judge(engine: str, storage: Storage, facts: ModelFacts, problems: dict[int, str | None]) -> EngineVerdict:
    if not facts.architecture:
        return EngineVerdict(engine, (), "", "no config.json names an architecture")
    loads = _LOADS.get((storage.quant_method, storage.granularity.name, storage.activations), {})
    if engine not in loads:
        return EngineVerdict(engine, (), "", *_why_not(engine, storage))
    if storage.granularity == BLOCK_128 and facts.architecture in _LOSES_BLOCK_SCALES.get(engine, {}):
        loader = _LOSES_BLOCK_SCALES[engine][facts.architecture]
        return EngineVerdict(engine, (), "", f"its {loader} loader loses block scales", "--scheme FP8_DYNAMIC")
    if engine == "transformers":
        return EngineVerdict(engine, (1,), loads[engine])
    fitting = tuple(tp for tp, problem in problems.items() if problem is None)
    reason = next((problem for problem in problems.values() if problem), "")
    remedy = "--scheme FP8_DYNAMIC" if storage.granularity == BLOCK_128 else ""
    return EngineVerdict(engine, fitting, loads[engine], reason, remedy)


def _why_not(engine: str, storage: Storage) -> tuple[str, str]:
    if storage.quant_method == "fp8pack":
        return "only load_packed() reads quant_method fp8pack", "--scheme FP8_BLOCK or FP8_DYNAMIC"
    specific = _WHY_NOT.get((storage.quant_method, storage.granularity.name), {}).get(engine)
    if specific:
        return specific
    if engine == "lmdeploy":
        return "block scales only", "--scheme FP8_BLOCK"
    return f"it has no reader for {storage.granularity} scales in {storage.quant_method}", "--scheme FP8_DYNAMIC"
