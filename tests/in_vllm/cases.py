"""What is packed for vLLM: families of models, and ways to pack them."""

from itertools import product

from in_vllm.models import FAMILIES

_STATIC = ("--scheme", "FP8", "--quant-method")
_TENSOR = ("--scheme", "FP8", "--activations", "dynamic", "--quant-method")
# Without torchao's dynamic activations, for which torchao itself wants a GPU.
WAYS: dict[str, tuple[str, ...]] = {
    "FP8_DYNAMIC": ("--scheme", "FP8_DYNAMIC"),
    "FP8_DYNAMIC, modelopt": ("--scheme", "FP8_DYNAMIC", "--quant-method", "modelopt"),
    "FP8_DYNAMIC, quark": ("--scheme", "FP8_DYNAMIC", "--quant-method", "quark"),
    "FP8_BLOCK": ("--scheme", "FP8_BLOCK"),
    "FP8_BLOCK, compressed-tensors": ("--scheme", "FP8_BLOCK", "--quant-method", "compressed-tensors"),
    "FP8_BLOCK, modelopt": ("--scheme", "FP8_BLOCK", "--quant-method", "modelopt"),
    "FP8_BLOCK, quark": ("--scheme", "FP8_BLOCK", "--quant-method", "quark"),
    "FP8": (*_STATIC, "modelopt"),
    "FP8, fp8": (*_STATIC, "fp8"),
    "FP8, compressed-tensors": (*_STATIC, "compressed-tensors"),
    "FP8, quark": (*_STATIC, "quark"),
    "FP8 with channel scales": (*_STATIC, "compressed-tensors", "--granularity", "channel"),
    "FP8 and KV cache": (*_STATIC, "modelopt", "--kv-cache"),
    "FP8 and KV cache, fp8": (*_STATIC, "fp8", "--kv-cache"),
    "FP8 and KV cache, compressed-tensors": (*_STATIC, "compressed-tensors", "--kv-cache"),
    "FP8 and KV cache, quark": (*_STATIC, "quark", "--kv-cache"),
    "FP8, dynamic, fp8": (*_TENSOR, "fp8"),
    "FP8, dynamic, compressed-tensors": (*_TENSOR, "compressed-tensors"),
    "FP8, dynamic, quark": (*_TENSOR, "quark"),
    "MXFP8": ("--scheme", "MXFP8"),
    "MXFP8, modelopt": ("--scheme", "MXFP8", "--quant-method", "modelopt"),
    "MXFP8, mxfp8": ("--scheme", "MXFP8", "--quant-method", "mxfp8"),
    "MXFP8, quark": ("--scheme", "MXFP8", "--quant-method", "quark"),
    "W8A16": ("--scheme", "W8A16"),
    "W8A16, quark": ("--scheme", "W8A16", "--quant-method", "quark"),
    "W8A16, torchao": ("--scheme", "W8A16", "--quant-method", "torchao"),
    "W8A16 with tensor scales": ("--scheme", "W8A16", "--granularity", "tensor"),
    "W8A16 with tensor scales, quark": ("--scheme", "W8A16", "--granularity", "tensor", "--quant-method", "quark"),
    "W8A16 with block scales": ("--scheme", "W8A16", "--granularity", "block:128x128"),
}


def is_static(way: str) -> bool:
    """Say whether a way needs a calibration."""
    return "FP8" in WAYS[way] and "--activations" not in WAYS[way]


# Static scales take a calibration each, and DeepSeek caches a latent vector instead of K and V.
CALIBRATED = ("Qwen3", "Phi3", "Mixtral", "DeepseekV3")
CASES = [
    (family, way)
    for family, way in product(FAMILIES, WAYS)
    if not is_static(way) or (family == "Qwen3" if "KV cache" in way else family in CALIBRATED)
]
# Those that are also run, and how far their log probabilities may be from those of the unpacked weights.
WEIGHT_ONLY, W8A8 = 0.02, 0.06
RUNS = {
    ("Qwen3", "FP8_DYNAMIC"): W8A8,
    ("Qwen3", "FP8_DYNAMIC, modelopt"): W8A8,
    ("Qwen3", "FP8_DYNAMIC, quark"): W8A8,
    ("Qwen3", "FP8_BLOCK"): WEIGHT_ONLY,
    ("Qwen3", "FP8_BLOCK, compressed-tensors"): WEIGHT_ONLY,
    ("Qwen3", "FP8_BLOCK, modelopt"): WEIGHT_ONLY,
    ("Qwen3", "FP8_BLOCK, quark"): WEIGHT_ONLY,
    ("Qwen3", "FP8"): W8A8,
    ("Qwen3", "MXFP8"): WEIGHT_ONLY,
    ("Qwen3", "MXFP8, modelopt"): WEIGHT_ONLY,
    ("Qwen3", "MXFP8, quark"): WEIGHT_ONLY,
    ("Qwen3", "W8A16"): WEIGHT_ONLY,
    ("Qwen3", "W8A16, torchao"): WEIGHT_ONLY,
    ("Qwen3", "W8A16 with tensor scales"): WEIGHT_ONLY,
    ("Phi3", "FP8_DYNAMIC"): W8A8,
    ("Phi3", "FP8_BLOCK"): WEIGHT_ONLY,
    ("Phi3", "W8A16 with tensor scales"): WEIGHT_ONLY,
}
