"""FP8 checkpoints as tools write them, each with the values that it means."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import oracle
from checkpoints import Tensors, llama_config, random_weight, write_model
from numpy.typing import NDArray

from fp8pack.checkpoint.quantized import read_contents
from fp8pack.checkpoint.source import open_checkpoint
from fp8pack.modelfacts.contents import Contents

E8M0, BF16 = ml_dtypes.float8_e8m0fnu, ml_dtypes.bfloat16
MODULE = "model.layers.0.mlp.up_proj"
WEIGHT = f"{MODULE}.weight"
EXPERTS = "model.layers.0.mlp.experts"


@dataclass
class Case:
    """A checkpoint as some tool writes it, and what it means."""

    tensors: Tensors
    config: dict[str, Any] | None
    values: dict[str, NDArray[np.float32]]
    granularity: str
    method: str
    activations: str = "dynamic"
    files: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, str] | None = None
    format: str = "e4m3"


def packed(
    granularity: str,
    shape: tuple[int, int] = (64, 64),
    *,
    scale: Any = np.float32,
    rounding: str = "none",
    format: str = "e4m3",
    seed: int = 0,
) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.float32]]:
    """Payload, its grid of scales in a dtype (uint8: exponents), and the values that the two mean."""
    weight = random_weight(shape, seed, np.float32) * np.exp2(np.arange(shape[0]) % 7)[:, None].astype(np.float32)
    codes, scales = oracle.quantize(weight, format, granularity, "up" if scale in (np.uint8, E8M0) else rounding)
    stored = scales.astype(E8M0 if scale is np.uint8 else scale)
    region = oracle.region_of(granularity, shape)
    values = codes.view(oracle.ELEMENT[format][0]).astype(np.float32)
    values = values * oracle.spread(stored.astype(np.float32), region, shape)
    return codes.view(oracle.ELEMENT[format][0]), stored.view(np.uint8) if scale is np.uint8 else stored, values


def linear(
    quantization: dict[str, Any] | None,
    granularity: str,
    scale_name: str = "weight_scale",
    *,
    shape: tuple[int, int] = (64, 64),
    scale: Any = np.float32,
    scale_shape: tuple[int, ...] | None = None,
    extra: Tensors | None = None,
    key: str = "quantization_config",
    method: str | None = None,
    named: str | None = None,
    **options: Any,
) -> Case:
    """One FP8 linear, a norm and the head, with config.json."""
    rounding = options.pop("rounding", "none")
    payload, scales, values = packed(granularity, shape, scale=scale, rounding=rounding)
    tensors: Tensors = {
        WEIGHT: payload,
        f"{MODULE}.{scale_name}": scales if scale_shape is None else scales.reshape(scale_shape),
        "model.norm.weight": random_weight((64,), 1),
        "lm_head.weight": random_weight((32, 64), 2),
        **(extra or {}),
    }
    config = llama_config() | ({key: quantization} if quantization else {})
    found = (quantization or {}).get("quant_method", "")
    return Case(
        tensors, config, {WEIGHT: values}, named or granularity, method if method is not None else found, **options
    )


def groups(weights: dict[str, Any], inputs: dict[str, Any] | None, format: str = "float-quantized") -> dict[str, Any]:
    """The schema of compressed-tensors, keys sorted as it writes them."""
    float8 = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "group_size": None}
    scheme = {
        "format": format,
        "input_activations": None if inputs is None else float8 | inputs,
        "output_activations": None,
        "targets": ["Linear"],
        "weights": float8 | weights,
    }
    return {
        "config_groups": {"group_0": scheme},
        "format": format,
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "version": "0.20.0",
    }


def quark(weight: dict[str, Any], inputs: dict[str, Any] | None) -> dict[str, Any]:
    """The schema of Quark, shortened."""
    float8 = {"dtype": "fp8_e4m3", "is_dynamic": False, "group_size": None, "block_size": None, "scale_format": None}
    scheme = {"weight": float8 | weight, "input_tensors": None if inputs is None else float8 | inputs}
    return {"quant_method": "quark", "global_quant_config": scheme, "exclude": ["lm_head"], "export": {}}


BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}
SCALAR: Tensors = {f"{MODULE}.input_scale": np.float32(0.25).reshape(())}
ACTIVATION: Tensors = {f"{MODULE}.activation_scale": np.float32(0.25).reshape(())}
MODELOPT = {"quant_method": "modelopt", "ignore": ["lm_head"], "producer": {"name": "modelopt", "version": "0.47.0"}}
STATIC = {"activations": "static"}
RAGGED = (200, 328)


def deepseek_v4_1() -> Case:
    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}
    return linear(config, "block:32x32", "scale", scale=E8M0, shape=(96, 64))


def hf_quant_config_only() -> Case:
    case = linear(None, "tensor", scale_shape=(), extra=SCALAR, activations="static")
    quantization = {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}
    case.files = {"hf_quant_config.json": {"producer": {"name": "modelopt"}, "quantization": quantization}}
    case.method = "modelopt"
    return case


def autoround_file_only() -> Case:
    case = linear(None, "block:128x128", "weight_scale_inv", shape=RAGGED)
    case.files = {"quantization_config.json": AUTOROUND}
    case.method = "auto-round"
    return case


AUTOROUND = {
    "quant_method": "auto-round",
    "bits": 8,
    "data_type": "fp",
    "group_size": [128, 128],
    "act_bits": 8,
    "act_group_size": 128,
    "act_dynamic": True,
    "extra_config": {"lm_head": {"bits": 16}},
}
AUTOROUND_MX = AUTOROUND | {"data_type": "mx_fp", "group_size": 32, "act_group_size": 32}


def mistral() -> Case:
    payload, scales, values = packed("tensor")
    module = "layers.0.feed_forward.w1"
    tensors: Tensors = {
        f"{module}.weight": payload,
        f"{module}.qscale_weight": scales.reshape(()),
        f"{module}.qscale_act": np.float32(0.5).reshape(()),
        "norm.weight": random_weight((64,)),
    }
    params = {"dim": 64, "n_layers": 1, "quantization": {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"}}
    files = {"params.json": params}
    return Case(tensors, None, {f"{module}.weight": values}, "tensor", "mistral", "static", files)


def torchao(granularity: str, shape: tuple[int, int]) -> Case:
    payload, scales, values = packed(granularity, shape)
    tensors: Tensors = {
        f"{MODULE}._weight_qdata": payload,
        f"{MODULE}._weight_scale": scales,
        "lm_head.weight": random_weight((32, 64)),
    }
    data = {"block_size": [1, shape[1]], "dtype": {"_type": "torch.dtype", "_data": "bfloat16"}}
    about = {"_type": "Float8Tensor", "_data": data, "_tensor_data_names": ["qdata", "scale"]}
    metadata = {
        "format": "pt",
        "tensor_names": json.dumps([WEIGHT, "lm_head.weight"]),
        WEIGHT: json.dumps(about),
        "lm_head.weight": json.dumps({"_type": "Tensor"}),
    }
    config = llama_config() | {"quantization_config": {"quant_method": "torchao", "quant_type": {"default": {}}}}
    return Case(tensors, config, {WEIGHT: values}, granularity, "torchao", metadata=metadata)


def tiles_of(exponents: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Exponents in NVIDIA's tiles, by its formula."""
    rows, cols = (-(-exponents.shape[0] // 128) * 128, -(-exponents.shape[1] // 4) * 4)
    flat = np.zeros(rows * cols, np.uint8)
    for r in range(exponents.shape[0]):
        for c in range(exponents.shape[1]):
            at = ((r // 128) * (cols // 4) + c // 4) * 512 + (r % 32) * 16 + (r % 128) // 32 * 4 + c % 4
            flat[at] = exponents[r, c]
    return flat.reshape(rows, cols)


def marker(text: dict[str, Any]) -> NDArray[np.uint8]:
    return np.frombuffer(json.dumps(text).encode(), np.uint8)


def comfyui(format: str = "e4m3") -> Case:
    payload, scales, values = packed("tensor", format=format)
    module = "model.diffusion_model.blocks.0.ffn.0"
    tensors: Tensors = {
        f"{module}.weight": payload,
        f"{module}.weight_scale": scales.reshape(()),
        f"{module}.comfy_quant": marker({"format": "float8_e4m3fn" if format == "e4m3" else "float8_e5m2"}),
        f"{module}.bias": random_weight((64,)),
    }
    return Case(tensors, None, {f"{module}.weight": values}, "tensor", "comfyui", format=format)


def comfyui_with_metadata() -> Case:
    case = comfyui()
    case.tensors = {name: tensor for name, tensor in case.tensors.items() if not name.endswith("comfy_quant")}
    layers = {"model.diffusion_model.blocks.0.ffn.0": {"format": "float8_e4m3fn"}}
    case.metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    return case


def comfyui_mx() -> Case:
    payload, exponents, values = packed("mx", (160, 96), scale=np.uint8)
    module = "blocks.0.ffn.0"
    tensors: Tensors = {
        f"{module}.weight": payload,
        f"{module}.weight_scale": tiles_of(exponents),
        f"{module}.comfy_quant": marker({"format": "mxfp8"}),
    }
    return Case(tensors, None, {f"{module}.weight": values}, "mx", "comfyui")


def comfyui_scaled() -> Case:
    payload, scales, values = packed("tensor")
    module = "double_blocks.0.img_mlp.0"
    tensors: Tensors = {
        "scaled_fp8": np.zeros(2, ml_dtypes.float8_e4m3fn),
        f"{module}.weight": payload,
        f"{module}.scale_weight": scales.reshape(()),
        f"{module}.scale_input": np.float32(0.5).reshape(()),
        "double_blocks.0.norm.weight": random_weight((64,)),
    }
    return Case(tensors, None, {f"{module}.weight": values}, "tensor", "comfyui-scaled", "static")


def unscaled() -> Case:
    """Files that were cast without a scale: weights, biases and norms alike."""
    element = ml_dtypes.float8_e4m3fn
    tensors: Tensors = {
        "blocks.0.ffn.0.weight": random_weight((64, 64), 0, np.float32).astype(element),
        "blocks.0.ffn.0.bias": random_weight((64,), 1, np.float32).astype(element),
        "blocks.0.patch.weight": random_weight((4, 2, 3, 3), 1, np.float32).astype(element),
        "img_in.weight": random_weight((64, 16)),
    }
    values = {name: tensor.astype(np.float32) for name, tensor in tensors.items() if tensor.dtype == element}
    return Case(tensors, None, values, "tensor", "")


def fused(parts: list[tuple[Any, Any, Any]]) -> list[NDArray[Any]]:
    """Payload, scales and values of experts, one below the other."""
    return [np.stack(arrays) for arrays in zip(*parts, strict=True)]


def fused_experts(granularity: str, stored: Callable[[NDArray[Any]], NDArray[Any]]) -> Case:
    """Experts as transformers stores them: [E, 2I, H] and [E, H, I], scales glued to the name."""
    up = fused([packed(granularity, (256, 384), seed=i) for i in range(3)])
    down = fused([packed(granularity, (384, 128), seed=10 + i) for i in range(3)])
    tensors: Tensors = {
        f"{EXPERTS}.gate_up_proj": up[0],
        f"{EXPERTS}.gate_up_proj_scale_inv": stored(up[1]),
        f"{EXPERTS}.down_proj": down[0],
        f"{EXPERTS}.down_proj_scale_inv": stored(down[1]),
    }
    values = {f"{EXPERTS}.gate_up_proj": up[2], f"{EXPERTS}.down_proj": down[2]}
    config = llama_config() | {"hidden_size": 384, "quantization_config": BLOCKS}
    return Case(tensors, config, values, granularity, "fp8")


def llama4_experts(hidden: int, inner: int) -> Case:
    """fbgemm: [E, H, 2I] with [E, 1, 2I], [E, I, H] with [E, H, 1]; a scale for each output, which comes last."""
    up = [packed("channel", (2 * inner, hidden), seed=i) for i in range(3)]
    down = [packed("channel", (hidden, inner), seed=10 + i) for i in range(3)]
    tensors: Tensors = {
        f"{EXPERTS}.gate_up_proj": np.stack([part[0].T for part in up]),
        f"{EXPERTS}.gate_up_proj_scale": np.stack([part[1].T for part in up]),
        f"{EXPERTS}.down_proj": np.stack([part[0].T for part in down]),
        f"{EXPERTS}.down_proj_scale": np.stack([part[1] for part in down]),
    }
    values = {
        f"{EXPERTS}.gate_up_proj": np.stack([part[2].T for part in up]),
        f"{EXPERTS}.down_proj": np.stack([part[2].T for part in down]),
    }
    config = {
        "architectures": ["Llama4ForCausalLM"],
        "model_type": "llama4_text",
        "hidden_size": hidden,
        "quantization_config": {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0},
    }
    return Case(tensors, config, values, "", "fbgemm_fp8")


TOKEN, GROUP_128 = {"strategy": "token", "dynamic": True}, {"strategy": "group", "group_size": 128, "dynamic": True}
CT_TENSOR = groups({"strategy": "tensor"}, {"strategy": "tensor"})
CT_BLOCK = groups({"strategy": "block", "block_structure": [128, 128]}, GROUP_128)
CT_MX = groups({"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}, TOKEN, "mxfp8-quantized")
CHANNELS = {"strategy": "channel"}
QUARK_BLOCK = {"qscheme": "per_block", "block_size": [128, 128]}
QUARK_GROUP = {"qscheme": "per_group", "group_size": 128, "is_dynamic": True}
QUARK_MX = {"qscheme": "per_group", "group_size": 32, "scale_format": "e8m0"}
FLOATS = {"fp8, F32": np.float32, "fp8, BF16": BF16, "fp8, F16": np.float16}
CASES: dict[str, Callable[[], Case]] = {
    **{
        name: lambda scale=scale: linear(BLOCKS, "block:128x128", "weight_scale_inv", shape=RAGGED, scale=scale)
        for name, scale in FLOATS.items()
    },
    "fp8, one block": lambda: linear(BLOCKS, "block:128x128", "weight_scale_inv"),
    "fp8, one block row": lambda: linear(BLOCKS, "block:128x128", "weight_scale_inv", shape=(1, 300)),
    "fp8, ue8m0": lambda: linear(
        BLOCKS | {"scale_fmt": "ue8m0"}, "block:128x128", "weight_scale_inv", shape=RAGGED, rounding="up"
    ),
    "DeepSeek-V4": lambda: linear(BLOCKS, "block:128x128", "scale", shape=RAGGED, scale=E8M0),
    "DeepSeek-V4.1": deepseek_v4_1,
    "fp8 in a text_config": lambda: linear(
        None, "block:128x128", "weight_scale_inv", shape=RAGGED, extra={}, method="fp8"
    ),
    "transformers, tensor": lambda: linear(
        BLOCKS | {"weight_block_size": None, "activation_scheme": "static"}, "tensor", "weight_scale_inv",
        scale_shape=(), extra=ACTIVATION, **STATIC,
    ),
    "AutoFP8, static": lambda: linear(
        {"quant_method": "fp8", "activation_scheme": "static"}, "tensor", scale_shape=(), extra=SCALAR, **STATIC
    ),
    "AutoFP8, dynamic": lambda: linear({"quant_method": "fp8", "activation_scheme": "dynamic"}, "tensor"),
    "compressed-tensors, tensor": lambda: linear(
        CT_TENSOR, "tensor", scale=BF16, scale_shape=(1,), extra={f"{MODULE}.input_scale": np.ones(1, BF16)}, **STATIC
    ),
    "compressed-tensors, channel": lambda: linear(groups(CHANNELS, TOKEN), "channel", scale=BF16),
    "compressed-tensors, block": lambda: linear(CT_BLOCK, "block:128x128", shape=RAGGED, scale=BF16),
    "compressed-tensors, block 64": lambda: linear(
        groups({"strategy": "block", "block_structure": [64, 64]}, GROUP_128), "block:64x64", shape=RAGGED
    ),
    "compressed-tensors, block as text": lambda: linear(
        groups({"strategy": "block", "block_structure": "64x64"}, GROUP_128), "block:64x64", shape=RAGGED
    ),
    "compressed-tensors, group": lambda: linear(
        groups({"strategy": "group", "group_size": 64}, TOKEN), "group:64", shape=(48, 192)
    ),
    "compressed-tensors, group of 32 in floats": lambda: linear(
        groups({"strategy": "group", "group_size": 32}, TOKEN), "group:32", shape=(48, 192)
    ),
    "compressed-tensors, mx": lambda: linear(CT_MX, "mx", shape=(48, 192), scale=np.uint8),
    "compressed-tensors, weights only": lambda: linear(
        groups(CHANNELS, None, "naive-quantized"), "channel", activations="none"
    ),
    "compression_config": lambda: linear(
        {key: value for key, value in groups(CHANNELS, TOKEN).items() if key != "quant_method"}, "channel",
        key="compression_config", method="compressed-tensors",
    ),
    "ModelOpt FP8": lambda: linear(MODELOPT | {"quant_algo": "FP8"}, "tensor", scale_shape=(), extra=SCALAR, **STATIC),
    "ModelOpt channel": lambda: linear(
        MODELOPT | {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}, "channel", scale_shape=(64,)
    ),
    "ModelOpt block": lambda: linear(
        MODELOPT | {"quant_algo": "fp8_pb_wo"}, "block:128x128", shape=RAGGED, scale_shape=(2, 1, 3, 1)
    ),
    "ModelOpt block of one row": lambda: linear(
        MODELOPT | {"quant_algo": "FP8_PB_WO"}, "block:128x128", shape=(128, 328), scale_shape=(1, 1, 3, 1)
    ),
    "ModelOpt MXFP8": lambda: linear(
        MODELOPT | {"quant_algo": "MXFP8", "group_size": 32}, "mx", shape=(48, 192), scale=np.uint8
    ),
    "ModelOpt mixed": lambda: linear(
        MODELOPT | {"quant_algo": "MIXED_PRECISION", "quantized_layers": {MODULE: {"quant_algo": "FP8_PB"}}},
        "block:128x128", "weight_scale_inv", shape=RAGGED,
    ),
    "hf_quant_config.json": hf_quant_config_only,
    "fbgemm_fp8": lambda: linear({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, "channel"),
    "torchao, row": lambda: torchao("channel", (64, 64)),
    "torchao, tensor": lambda: torchao("tensor", (48, 64)),
    "Quark, tensor": lambda: linear(
        quark({"qscheme": "per_tensor"}, {"qscheme": "per_tensor"}), "tensor", scale_shape=(1,), extra=SCALAR, **STATIC
    ),
    "Quark, channel": lambda: linear(quark({"qscheme": "per_channel"}, TOKEN), "channel", scale_shape=(64,)),
    "Quark, block": lambda: linear(quark(QUARK_BLOCK, QUARK_GROUP), "block:128x128", shape=RAGGED),
    "Quark, block of exponents": lambda: linear(
        quark(QUARK_BLOCK, QUARK_GROUP), "block:128x128", shape=RAGGED, scale=E8M0
    ),
    "Quark, 16x32 exponents": lambda: linear(
        quark({"qscheme": "per_block", "block_size": [16, 32]}, QUARK_MX), "block:16x32", shape=(64, 96), scale=E8M0
    ),
    "Quark, mx": lambda: linear(quark(QUARK_MX, QUARK_MX), "mx", shape=(48, 192), scale=np.uint8),
    "Quark, weights only": lambda: linear(
        quark({"qscheme": "per_tensor"}, None), "tensor", scale_shape=(), activations="none"
    ),
    "mxfp8": lambda: linear(
        {"quant_method": "mxfp8", "weight_block_size": [1, 32]}, "mx", "weight_scale_inv", shape=(48, 192),
        scale=np.uint8,
    ),
    "auto-round, block": lambda: linear(AUTOROUND, "block:128x128", "weight_scale_inv", shape=RAGGED),
    "auto-round, mx": lambda: linear(AUTOROUND_MX, "mx", shape=(48, 192), scale=np.uint8),
    "quantization_config.json": autoround_file_only,
    "w8a8_fp8": lambda: linear({"quant_method": "w8a8_fp8"}, "channel"),
    "Mistral": mistral,
    "ComfyUI": comfyui,
    "ComfyUI, e5m2": lambda: comfyui("e5m2"),
    "ComfyUI, metadata": comfyui_with_metadata,
    "ComfyUI, mx": comfyui_mx,
    "ComfyUI, older": comfyui_scaled,
    "unscaled": unscaled,
    "scaled without a word": lambda: linear(None, "tensor", scale_shape=(), extra=SCALAR, **STATIC),
    "fused experts, block": lambda: fused_experts("block:128x128", lambda scales: scales),
    "fused experts, channel": lambda: fused_experts("channel", lambda scales: scales),
    "fused experts, tensor": lambda: fused_experts("tensor", lambda scales: scales.reshape(3)),
    "fused experts, tensor as [E, 1, 1]": lambda: fused_experts("tensor", lambda scales: scales),
    "Llama 4": lambda: llama4_experts(96, 32),
    "Llama 4, H = I": lambda: llama4_experts(64, 64),
    "Llama 4, H = 2I": lambda: llama4_experts(64, 32),
}  # fmt: skip


def build(name: str, folder: Path) -> tuple[Case, Path]:
    case = CASES[name]()
    if name == "fp8 in a text_config":
        text = llama_config() | {"quantization_config": BLOCKS}
        case.config = {"architectures": ["X"], "model_type": "x", "text_config": text}
    write_model(folder, case.tensors, case.config, metadata=case.metadata)
    for file, document in case.files.items():
        (folder / file).write_text(json.dumps(document))
    return case, folder


def read(folder: Path) -> Contents:
    return read_contents(open_checkpoint(folder))
