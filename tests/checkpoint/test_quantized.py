"""Reading FP8 checkpoints of every convention: names, shapes, dtypes, the values they mean, and what is refused."""

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import oracle
import pytest
import torch
from checkpoints import Tensors, llama_config, random_weight, read_tensors, write_model, write_shard
from numpy.typing import NDArray

import fp8pack
from fp8pack.checkpoint.quantized import read_contents
from fp8pack.checkpoint.source import open_checkpoint
from fp8pack.errors import InputError
from fp8pack.modelfacts.contents import Contents
from fp8pack.packing.prepare import WriteOptions
from fp8pack.planning.recipe import Request

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


@pytest.mark.parametrize("name", CASES)
def test_a_convention_is_understood_from_its_headers(name: str, tmp_path: Path) -> None:
    case, folder = build(name, tmp_path / "model")
    contents = read(folder)
    assert contents.method == case.method
    assert contents.activations == case.activations
    assert contents.unread == ()
    assert set(contents.quantized) == set(case.values)
    for quantized in contents.quantized.values():
        assert quantized.format.name == case.format
        if "experts" not in name and case.granularity:
            assert quantized.granularity.name == case.granularity
    plain = {n for n, t in case.tensors.items() if not n.endswith(("fp8", "quant")) and "scale" not in n}
    plain = {n.replace("_weight_qdata", "weight") for n in plain}
    assert {spec.name for spec in contents.tensors} == plain


@pytest.mark.parametrize("name", CASES)
def test_a_convention_means_the_values_that_its_tool_means(name: str, tmp_path: Path) -> None:
    case, folder = build(name, tmp_path / "model")
    loaded = fp8pack.load_packed(folder)
    fp8pack.unpack(folder, "float32", WriteOptions(tmp_path / "out"))
    unpacked = read_tensors(tmp_path / "out")
    for weight, values in case.values.items():
        tensor = loaded[weight]
        assert isinstance(tensor, fp8pack.PackedTensor)
        found = tensor.dequantize(torch.float32).numpy()
        np.testing.assert_array_equal(unpacked[weight], values, err_msg=f"unpack {weight}")
        np.testing.assert_array_equal(found, values, err_msg=f"load_packed {weight}")


@pytest.mark.parametrize("name", CASES)
def test_a_convention_can_be_inspected(name: str, tmp_path: Path) -> None:
    case, folder = build(name, tmp_path / "model")
    facts = fp8pack.inspect(folder)
    assert facts["totals"]["num_packed"] == len(case.values)
    assert facts["quant_method"] == case.method


def test_a_static_scale_of_what_enters_is_found_under_each_name(tmp_path: Path) -> None:
    names = ("transformers, tensor", "AutoFP8, static", "ModelOpt FP8", "Quark, tensor", "Mistral", "ComfyUI, older")
    for name in names:
        _, folder = build(name, tmp_path / name)
        (quantized,) = read(folder).quantized.values()
        assert quantized.input_scale is not None, name


def test_a_fused_expert_tensor_of_16384_rows_has_blocks_and_no_scale_for_each_column(tmp_path: Path) -> None:
    """The grid [E, 128, K / 128] has as many numbers as [E, K]: only the shape tells them apart."""
    shape, grid = (2, 16384, 256), (2, 128, 2)
    begin = 2 * 16384 * 256
    entries = {
        f"{EXPERTS}.gate_up_proj": {"dtype": "F8_E4M3", "shape": shape, "data_offsets": [0, begin]},
        f"{EXPERTS}.gate_up_proj_scale_inv": {
            "dtype": "F32", "shape": grid, "data_offsets": [begin, begin + 4 * 2 * 128 * 2],
        },
    }  # fmt: skip
    raw = json.dumps(entries).encode()
    folder = write_model(tmp_path / "model", {"x": np.zeros(1, np.uint8)}, {"quantization_config": BLOCKS})
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + begin + 4 * 2 * 128 * 2)
    (quantized,) = read(folder).quantized.values()
    assert quantized.granularity.name == "block:128x128"


def test_fused_mx_experts_of_32_rows_are_mx(tmp_path: Path) -> None:
    parts = fused([packed("mx", (32, 64), scale=np.uint8, seed=i) for i in range(2)])
    tensors: Tensors = {f"{EXPERTS}.down_proj": parts[0], f"{EXPERTS}.down_proj_scale_inv": parts[1]}
    config = {"hidden_size": 32, "quantization_config": {"quant_method": "mxfp8", "weight_block_size": [1, 32]}}
    folder = write_model(tmp_path / "model", tensors, config)
    (quantized,) = read(folder).quantized.values()
    assert quantized.granularity.name == "mx"
    fp8pack.unpack(folder, "float32", WriteOptions(tmp_path / "out"))
    np.testing.assert_array_equal(read_tensors(tmp_path / "out")[f"{EXPERTS}.down_proj"], parts[2])


@pytest.mark.parametrize("shape", [(128, 96), (96, 96)], ids=str)
def test_modelopts_channel_scales_of_fused_experts_have_two_dimensions(shape: tuple[int, int], tmp_path: Path) -> None:
    """[E, N] beside [E, N, K], as [N] stands beside [N, K]; where N = K, the model's type says what comes last."""
    parts = fused([packed("channel", shape, seed=i) for i in range(3)])
    name = f"{EXPERTS}.gate_up_proj"
    tensors: Tensors = {name: parts[0], f"{name}_weight_scale": parts[1].reshape(3, -1)}
    quantization = MODELOPT | {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}
    config = llama_config() | {"hidden_size": shape[1], "quantization_config": quantization}
    folder = write_model(tmp_path / "model", tensors, config)
    fp8pack.unpack(folder, "float32", WriteOptions(tmp_path / "out"))
    np.testing.assert_array_equal(read_tensors(tmp_path / "out")[name], parts[2])


# Mixed layers.


def test_layers_of_different_granularities_and_floats_stand_side_by_side(tmp_path: Path) -> None:
    """As mixed-precision compressed-tensors: a block group, a channel group, a tensor group, and what is ignored."""
    config = groups(CHANNELS, TOKEN)
    config["config_groups"]["group_1"] = CT_BLOCK["config_groups"]["group_0"] | {"targets": ["re:.*down_proj"]}
    tensors: Tensors = {"model.layers.0.mlp.gate_proj.weight": random_weight((64, 64))}
    expected = {}
    kinds = {"up_proj": "channel", "down_proj": "block:128x128", "o_proj": "tensor"}
    for i, (leaf, granularity) in enumerate(kinds.items()):
        payload, scales, values = packed(granularity, (256, 256), seed=i)
        tensors |= {f"model.layers.0.mlp.{leaf}.weight": payload, f"model.layers.0.mlp.{leaf}.weight_scale": scales}
        expected[f"model.layers.0.mlp.{leaf}.weight"] = (granularity, values)
    folder = write_model(tmp_path / "model", tensors, llama_config() | {"quantization_config": config})
    contents = read(folder)
    assert {n: q.granularity.name for n, q in contents.quantized.items()} == {n: g for n, (g, _) in expected.items()}
    loaded = fp8pack.load_packed(folder)
    for name, (_, values) in expected.items():
        np.testing.assert_array_equal(loaded[name].dequantize(torch.float32).numpy(), values)


def test_channel_scales_with_k_of_128_are_no_groups_though_activations_have_groups_of_128(tmp_path: Path) -> None:
    """[N, 1] may be either; the group of 128 that is announced is that of activations."""
    config = groups(CHANNELS, TOKEN)
    config["config_groups"]["group_1"] = CT_BLOCK["config_groups"]["group_0"] | {"targets": ["re:.*down_proj"]}
    payload, scales, values = packed("channel", (64, 128))
    tensors: Tensors = {WEIGHT: payload, f"{MODULE}.weight_scale": scales}
    folder = write_model(tmp_path / "model", tensors, llama_config() | {"quantization_config": config})
    (quantized,) = read(folder).quantized.values()
    assert quantized.granularity.name == "channel"
    assert np.array_equal(fp8pack.load_packed(folder)[WEIGHT].dequantize(torch.float32).numpy(), values)


def test_multi_token_prediction_layers_are_read_as_any_other(tmp_path: Path) -> None:
    payload, scales, _ = packed("block:128x128", (128, 128))
    names = ("model.layers.0.mlp.down_proj", "model.layers.61.eh_proj", "model.layers.61.mlp.down_proj")
    tensors: Tensors = {f"{name}.weight": payload for name in names}
    tensors |= {f"{name}.weight_scale_inv": scales for name in names}
    config = llama_config(layers=61) | {"quantization_config": BLOCKS}
    contents = read(write_model(tmp_path / "model", tensors, config))
    assert set(contents.quantized) == {f"{name}.weight" for name in names}


def test_weights_and_scales_may_lie_in_different_shards(tmp_path: Path) -> None:
    case = CASES["fp8, F32"]()
    folder = write_model(tmp_path / "model", case.tensors, case.config, shards=2)
    (quantized,) = read(folder).quantized.values()
    assert quantized.scale is not None
    assert quantized.scale.file == "model-00002-of-00002.safetensors"
    assert np.array_equal(fp8pack.load_packed(folder)[WEIGHT].dequantize(torch.float32).numpy(), case.values[WEIGHT])


# Scales of K and V.

ATTENTION = "model.layers.0.self_attn"
KV_SPELLINGS = {
    "compressed-tensors, AutoFP8": (f"{ATTENTION}.k_scale", f"{ATTENTION}.v_scale"),
    "ModelOpt": (f"{ATTENTION}.k_proj.k_scale", f"{ATTENTION}.v_proj.v_scale"),
    "Quark": (f"{ATTENTION}.k_proj.output_scale", f"{ATTENTION}.v_proj.output_scale"),
    "fused on disk": (f"{ATTENTION}.qkv_proj.k_scale", f"{ATTENTION}.qkv_proj.v_scale"),
    "vLLM's own": (f"{ATTENTION}.attn.k_scale", f"{ATTENTION}.attn.v_scale"),
    "Hunyuan": (f"{ATTENTION}.k_cache.scale", f"{ATTENTION}.v_cache.scale"),
    "Mistral": (f"{ATTENTION}.k_fake_quantizer.qscale_act", f"{ATTENTION}.v_fake_quantizer.qscale_act"),
}


@pytest.mark.parametrize("shape", [(), (1,), (2, 1, 1)], ids=str)
@pytest.mark.parametrize("spelling", KV_SPELLINGS)
def test_scales_of_k_and_v_are_found_under_each_name(spelling: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    scales = {name: np.full(shape, i + 1, np.float32) for i, name in enumerate(KV_SPELLINGS[spelling])}
    case = linear(CT_BLOCK, "block:128x128", extra=scales)
    folder = write_model(tmp_path / "model", case.tensors, case.config)
    contents = read(folder)
    assert set(contents.kv_scales) == {f"{ATTENTION}.k", f"{ATTENTION}.v"}
    assert not any("scale" in spec.name for spec in contents.tensors)
    kv_scales = fp8pack.load_packed(folder).kv_scales
    assert [float(kv_scales[f"{ATTENTION}.{kind}"].flatten()[0]) for kind in "kv"] == [1.0, 2.0]


@pytest.mark.parametrize("attention", ["backbone.layers.3.mixer", "model.language_model.layers.0.self_attn"])
def test_attentions_of_other_names_have_scales_too(attention: str, tmp_path: Path) -> None:
    scales = {f"{attention}.{kind}_proj.{kind}_scale": np.ones((), np.float32) for kind in "kv"}
    case = linear(CT_BLOCK, "block:128x128", extra=scales)
    contents = read(write_model(tmp_path / "model", case.tensors, case.config))
    assert set(contents.kv_scales) == {f"{attention}.k", f"{attention}.v"}


def test_the_oldest_scale_serves_k_and_v(tmp_path: Path) -> None:
    case = linear(CT_BLOCK, "block:128x128", extra={f"{ATTENTION}.kv_scale": np.ones(1, np.float32)})
    contents = read(write_model(tmp_path / "model", case.tensors, case.config))
    assert {point: spec.name for point, spec in contents.kv_scales.items()} == {
        f"{ATTENTION}.{kind}": f"{ATTENTION}.kv_scale" for kind in "kv"
    }


def test_the_scales_of_q_and_of_probabilities_do_not_stay_behind_as_weights(tmp_path: Path) -> None:
    scales = {
        f"{ATTENTION}.{name}": np.ones((), np.float32)
        for name in ("k_scale", "v_scale", "q_scale", "q_proj.output_scale", "prob_output_scale")
    }
    case = linear(CT_BLOCK, "block:128x128", extra=scales)
    folder = write_model(tmp_path / "model", case.tensors, case.config)
    assert set(read(folder).kv_scales) == {f"{ATTENTION}.k", f"{ATTENTION}.v"}
    fp8pack.unpack(folder, options=WriteOptions(tmp_path / "out"))
    assert [name for name in read_tensors(tmp_path / "out") if "scale" in name] == []


# What is no weight and no scale.


class _Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path(_Trap.path),))

    path = ""


def test_transformer_engines_pickled_state_is_a_tensor_as_any_other(tmp_path: Path) -> None:
    _Trap.path = str(tmp_path / "sprung")
    state = np.frombuffer(pickle.dumps({"recipe": _Trap()}), np.uint8)
    extra: Tensors = {f"{MODULE}._extra_state": state, "model.layers.1.mlp._extra_state": np.zeros(0, np.uint8)}
    case = linear(BLOCKS, "block:128x128", "weight_scale_inv", extra=extra)
    folder = write_model(tmp_path / "model", case.tensors, case.config)
    assert read(folder).unread == ()
    fp8pack.load_packed(folder)[f"{MODULE}._extra_state"]
    fp8pack.inspect(folder)
    fp8pack.unpack(folder, options=WriteOptions(tmp_path / "out"))
    assert read_tensors(tmp_path / "out")[f"{MODULE}._extra_state"].tobytes() == state.tobytes()
    assert not (tmp_path / "sprung").exists()
    pickle.loads(state.tobytes())
    assert (tmp_path / "sprung").exists(), "the trap is a real one"


# Refusals.


def refusal(folder: Path, *, what: Callable[[Path], object] = read) -> str:
    with pytest.raises(InputError) as caught:
        what(folder)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize(
    "name", ["fp8, F32", "compressed-tensors, channel", "ModelOpt FP8", "torchao, row", "Mistral", "ComfyUI"]
)
def test_an_fp8_weight_without_its_scale_is_refused(name: str, tmp_path: Path) -> None:
    case, folder = build(name, tmp_path / "model")
    (weight,) = case.values
    scales = [n for n in case.tensors if "scale" in n and "act" not in n and "input" not in n]
    write_shard(
        folder / "model.safetensors",
        {n: t for n, t in case.tensors.items() if n not in scales},
        case.metadata,
    )
    message = refusal(folder)
    assert weight.removesuffix("weight") in message
    assert "no scale" in message


@pytest.mark.parametrize("name", ["fp8, F32", "compressed-tensors, channel", "ModelOpt FP8", "torchao, row", "Mistral"])
def test_a_scale_without_its_fp8_weight_is_refused(name: str, tmp_path: Path) -> None:
    """Also where a float weight stands in its place: one of the two is not what it was."""
    case, folder = build(name, tmp_path / "model")
    (weight,) = case.values
    payload = next(n for n, t in case.tensors.items() if t.dtype == ml_dtypes.float8_e4m3fn)
    module = weight.removesuffix(".weight")
    whole = {n.replace(module, "layers.9.mlp.w1"): t for n, t in case.tensors.items() if n.startswith(module)}
    for replacement in ({}, {weight: random_weight((64, 64))}):
        tensors = {n: t for n, t in case.tensors.items() if n != payload} | replacement | whole
        write_shard(folder / "model.safetensors", tensors, case.metadata)
        assert "without an FP8 weight" in refusal(folder)


def test_a_fused_scale_without_its_fp8_weight_is_refused(tmp_path: Path) -> None:
    case, folder = build("fused experts, block", tmp_path / "model")
    tensors = {n: t for n, t in case.tensors.items() if n != f"{EXPERTS}.down_proj"}
    write_shard(folder / "model.safetensors", tensors)
    assert "without an FP8 weight" in refusal(folder)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("fp8, F32", (3, 3)),
        ("fp8, F32", (3, 2)),
        ("fp8, F32", (2, 3, 1)),
        ("fp8, F32", (0,)),
        ("compressed-tensors, channel", (63, 1)),
        ("compressed-tensors, channel", (1, 1, 64)),
        ("compressed-tensors, mx", (48, 5)),
        ("ModelOpt block", (2, 3, 1, 1)),
        ("ModelOpt channel", (2,)),
        ("fused experts, block", (3, 3, 2)),
        ("fused experts, block", (2, 2, 3)),
        ("fused experts, block", (5,)),
    ],
    ids=str,
)
def test_a_scale_of_a_shape_that_fits_nothing_is_refused(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    case, folder = build(name, tmp_path / "model")
    scale = next(n for n in case.tensors if "scale" in n)
    wrong = np.ones(shape, case.tensors[scale].dtype)
    write_shard(folder / "model.safetensors", case.tensors | {scale: wrong})
    message = refusal(folder)
    assert "fit no region" in message
    assert str(list(shape)) in message


@pytest.mark.parametrize("value", [-1.0, np.nan, np.inf])
@pytest.mark.parametrize("what", ["unpack", "convert"])
def test_a_scale_that_is_no_scale_is_refused_when_written(what: str, value: float, tmp_path: Path) -> None:
    case, folder = build("fp8, F32", tmp_path / "model")
    scale = case.tensors[f"{MODULE}.weight_scale_inv"].copy()
    scale[1, 2] = value
    write_shard(folder / "model.safetensors", case.tensors | {f"{MODULE}.weight_scale_inv": scale})
    options = WriteOptions(tmp_path / "out")
    asked = Request(quant_method="fp8pack", scheme="FP8_BLOCK")
    run = {
        "unpack": lambda path: fp8pack.unpack(path, options=options),
        "convert": lambda path: fp8pack.convert(path, asked, options),
    }[what]
    assert "weight_scale_inv" in refusal(folder, what=run)
    assert not (tmp_path / "out").exists()


def test_an_exponent_of_255_is_no_scale(tmp_path: Path) -> None:
    case, folder = build("mxfp8", tmp_path / "model")
    scale = case.tensors[f"{MODULE}.weight_scale_inv"].copy()
    scale[3, 3] = 255
    write_shard(folder / "model.safetensors", case.tensors | {f"{MODULE}.weight_scale_inv": scale})
    refusal(folder, what=lambda path: fp8pack.unpack(path, options=WriteOptions(tmp_path / "out")))


OTHERS: dict[str, tuple[dict[str, Any], Tensors]] = {
    "NVFP4 of ModelOpt": (
        MODELOPT | {"quant_algo": "NVFP4", "group_size": 16},
        {
            WEIGHT: np.zeros((64, 32), np.uint8),
            f"{MODULE}.weight_scale": np.ones((64, 4), ml_dtypes.float8_e4m3fn),
            f"{MODULE}.weight_scale_2": np.ones((), np.float32),
            f"{MODULE}.input_scale": np.ones((), np.float32),
        },
    ),
    "NVFP4 of compressed-tensors": (
        groups({"strategy": "tensor_group", "group_size": 16, "num_bits": 4}, TOKEN, "nvfp4-pack-quantized"),
        {
            f"{MODULE}.weight_packed": np.zeros((64, 32), np.uint8),
            f"{MODULE}.weight_scale": np.ones((64, 4), ml_dtypes.float8_e4m3fn),
            f"{MODULE}.weight_global_scale": np.ones(1, np.float32),
        },
    ),
    "INT4 of compressed-tensors": (
        groups({"strategy": "group", "group_size": 32, "num_bits": 4, "type": "int"}, None, "pack-quantized"),
        {
            f"{MODULE}.weight_packed": np.zeros((64, 8), np.int32),
            f"{MODULE}.weight_scale": np.ones((64, 2), BF16),
            f"{MODULE}.weight_shape": np.array([64, 64], np.int64),
        },
    ),
    "INT8 of compressed-tensors": (
        groups({"strategy": "channel", "type": "int"}, TOKEN, "int-quantized"),
        {WEIGHT: np.zeros((64, 64), np.int8), f"{MODULE}.weight_scale": np.ones((64, 1), BF16)},
    ),
    "MXFP4 of gpt-oss": (
        {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
        {
            f"{EXPERTS}.gate_up_proj_blocks": np.zeros((2, 64, 2, 16), np.uint8),
            f"{EXPERTS}.gate_up_proj_scales": np.zeros((2, 64, 2), np.uint8),
        },
    ),
    "FP4 experts of DeepSeek-V4": (
        BLOCKS | {"expert_dtype": "fp4"},
        {
            f"{EXPERTS}.0.w1.weight": np.zeros((64, 32), np.int8),
            f"{EXPERTS}.0.w1.scale": np.ones((64, 2), E8M0),
        },
    ),
    "FP8 of AMD's older GPUs": (
        {"quant_method": "fp8", "activation_scheme": "dynamic"},
        {WEIGHT: np.zeros((64, 64), ml_dtypes.float8_e4m3fnuz), f"{MODULE}.weight_scale": np.ones((), np.float32)},
    ),
    "GPTQ": (
        {"quant_method": "gptq", "bits": 4},
        {f"{MODULE}.qweight": np.zeros((8, 64), np.int32), f"{MODULE}.scales": np.ones((1, 64), np.float16)},
    ),
}


@pytest.mark.parametrize("with_fp8", [False, True], ids=["alone", "beside FP8"])
@pytest.mark.parametrize("name", OTHERS)
def test_weights_of_other_formats_are_recognised_and_refused(name: str, with_fp8: bool, tmp_path: Path) -> None:
    config, tensors = OTHERS[name]
    payload, scales, _ = packed("tensor")
    module = "model.layers.0.self_attn.o_proj"
    beside: Tensors = {f"{module}.weight": payload, f"{module}.weight_scale": scales} if with_fp8 else {}
    beside |= {"lm_head.weight": random_weight((32, 64))}
    folder = write_model(tmp_path / "model", tensors | beside, llama_config() | {"quantization_config": config})
    assert len(read(folder).unread) == 1
    fp8pack.inspect(folder)
    options = WriteOptions(tmp_path / "out")
    for run in (
        lambda path: fp8pack.unpack(path, options=options),
        lambda path: fp8pack.convert(path, Request(scheme="FP8_DYNAMIC"), options),
    ):
        message = refusal(folder, what=run)
        assert "neither FP8 nor floats" in message
        assert read(folder).unread[0] in message
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_tiles_that_are_not_padded_are_refused_and_never_read_beyond_their_end(tmp_path: Path) -> None:
    """ComfyUI's and torchao's tiles are whole: a tensor with fewer bytes than its tiles holds something else."""
    case, folder = build("ComfyUI, mx", tmp_path / "model")
    scale = next(name for name in case.tensors if "scale" in name)
    wrong = np.full((160, 3), 127, np.uint8)
    write_shard(folder / "model.safetensors", {scale: wrong} | {n: t for n, t in case.tensors.items() if n != scale})
    options = WriteOptions(tmp_path / "out")
    assert "fit no region" in refusal(folder, what=lambda path: fp8pack.unpack(path, options=options))


def test_of_files_without_a_word_one_weight_that_lost_its_scale_is_not_taken_for_unscaled(tmp_path: Path) -> None:
    """Its values would be a thousand times too large, and nothing would say so."""
    case, folder = build("scaled without a word", tmp_path / "model")
    other = "model.layers.1.mlp.up_proj.weight"
    write_shard(folder / "model.safetensors", case.tensors | {other: packed("tensor")[0]})
    message = refusal(folder)
    assert other in message


def test_two_tensors_that_claim_one_name_are_refused(tmp_path: Path) -> None:
    """torchao's `_weight_qdata` is `weight`; a file that holds both would be written with one of them twice."""
    case = CASES["torchao, row"]()
    tensors = case.tensors | {WEIGHT: random_weight((64, 64))}
    folder = write_model(tmp_path / "model", tensors, case.config, metadata=case.metadata)
    message = refusal(folder, what=lambda path: fp8pack.unpack(path, options=WriteOptions(tmp_path / "out")))
    assert WEIGHT in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("grid", [(), (1,), (0, 1)], ids=str)
def test_an_fp8_weight_without_elements_is_no_error_anywhere(grid: tuple[int, ...], tmp_path: Path) -> None:
    case = CASES["compressed-tensors, channel"]()
    name = "model.layers.1.mlp.up_proj.weight"
    empty: Tensors = {name: np.zeros((0, 64), ml_dtypes.float8_e4m3fn), f"{name}_scale": np.ones(grid, np.float32)}
    folder = write_model(tmp_path / "model", case.tensors | empty, case.config)
    assert fp8pack.load_packed(folder)[name].dequantize(torch.float32).shape == (0, 64)
    fp8pack.unpack(folder, options=WriteOptions(tmp_path / "out"))
    assert read_tensors(tmp_path / "out")[name].shape == (0, 64)
    fp8pack.convert(folder, Request(quant_method="modelopt"), WriteOptions(tmp_path / "converted"))
    assert fp8pack.inspect(folder)["totals"]["num_packed"] == 2
    assert fp8pack.diff(folder, folder)["totals"]["num_equal"] == 4


def test_fp8_bytes_of_amds_older_gpus_are_never_passed_on_as_they_are(tmp_path: Path) -> None:
    """They mean half of what the same bytes mean elsewhere, and nothing would say so."""
    case = CASES["unscaled"]()
    odd: Tensors = {"blocks.1.ffn.0.weight": np.ones((64, 64), ml_dtypes.float8_e4m3fnuz)}
    folder = write_model(tmp_path / "model", case.tensors | odd)
    message = refusal(folder, what=lambda path: fp8pack.unpack(path, options=WriteOptions(tmp_path / "out")))
    assert "blocks.1.ffn.0.weight" in message


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "x", "granularity": "PerRow()"},
        {"quant_method": "fp8pack", "granularity": 7},
        {"quant_method": "fp8pack"},
        {"quant_method": None, "group_size": True},
        {"quant_method": ["fp8"], "weight_block_size": [0, -1]},
        {"quant_method": "fp8", "weight_block_size": [10**40, 10**40], "config_groups": [1]},
        {"quant_method": "fp8", "weight_block_size": "128x128", "config_groups": {"g": None}},
        {"quant_method": "compressed-tensors", "config_groups": {"FP8_DYNAMIC": ["Linear"]}},
    ],
    ids=json.dumps,
)
def test_strange_configurations_are_read_by_shape_or_refused_in_one_line(
    quantization: dict[str, Any], tmp_path: Path
) -> None:
    case = linear(quantization, "channel", method="")
    folder = write_model(tmp_path / "model", case.tensors, case.config)
    try:
        (quantized,) = read(folder).quantized.values()
    except InputError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert quantized.granularity.name == "channel"
