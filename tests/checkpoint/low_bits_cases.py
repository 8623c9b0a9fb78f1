"""Checkpoints of FP4 and integers as tools write them, each with the BF16 values that those tools compute."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from checkpoint.quantized_cases import BLOCKS, E8M0, MODELOPT, groups, quark
from checkpoints import Tensors, llama_config, random_weight, write_model
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationScheme
from numpy.typing import NDArray
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

BF16, E4M3 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
LAYER = "model.layers.0"
MODULE = f"{LAYER}.mlp.up_proj"
EXPERTS = f"{LAYER}.mlp.experts"
N, K, HIDDEN = 48, 192, 64


@dataclass
class LowBits:
    """A checkpoint, the values of its weights in BF16, and how they are stored."""

    tensors: Tensors
    quantization: dict[str, Any]
    values: Tensors
    format: str
    granularity: str
    model: dict[str, Any]

    @property
    def rest(self) -> Tensors:
        """What is in floats beside the weights."""
        return {
            "model.norm.weight": random_weight((self.model.get("hidden_size", HIDDEN),), 1),
            f"{LAYER}.self_attn.o_proj.weight": random_weight((64, 64), 2),
            "lm_head.weight": random_weight((32, 64), 3),
        } | {name: tensor for name, tensor in self.tensors.items() if name.endswith("_bias")}

    def write(self, folder: Path, **options: Any) -> Path:
        config = (
            llama_config(layers=1) | {"hidden_size": HIDDEN} | self.model | {"quantization_config": self.quantization}
        )
        return write_model(folder, self.tensors | self.rest, config, **options)


def codes(shape: tuple[int, ...], seed: int = 0) -> NDArray[np.uint8]:
    """Bytes, of which every one is there."""
    found = np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)
    assert found.size < 2048 or len(np.unique(found)) == 256
    return found


def exponents(shape: tuple[int, ...], seed: int = 1) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(100, 140, shape).astype(np.uint8)


def scales(shape: tuple[int, ...], seed: int = 2, dtype: Any = BF16) -> NDArray[Any]:
    return np.exp(np.random.default_rng(seed).normal(-5, 1, shape)).astype(dtype)


def as_bf16(values: torch.Tensor) -> NDArray[Any]:
    return values.to(torch.bfloat16).contiguous().view(torch.uint16).numpy().view(BF16)


def as_torch(tensor: NDArray[Any]) -> torch.Tensor:
    match tensor.dtype:
        case ml_dtypes.bfloat16:
            return torch.from_numpy(tensor.view(np.uint16).copy()).view(torch.bfloat16)
        case ml_dtypes.float8_e4m3fn:
            return torch.from_numpy(tensor.view(np.uint8).copy()).view(torch.float8_e4m3fn)
    return torch.from_numpy(tensor.copy())


def case(leaves: Tensors, quantization: dict[str, Any], values: NDArray[Any], format: str, granularity: str) -> LowBits:
    """One linear."""
    tensors = {f"{MODULE}.{leaf}": tensor for leaf, tensor in leaves.items()}
    return LowBits(tensors, quantization, {f"{MODULE}.weight": values}, format, granularity, {})


def decompressed(leaves: Tensors, quantization: dict[str, Any]) -> NDArray[Any]:
    """What compressed-tensors makes of a linear."""
    (group,) = quantization["config_groups"].values()
    scheme = QuantizationScheme.model_validate({key: value for key, value in group.items() if value is not None})
    state = {leaf: as_torch(tensor) for leaf, tensor in leaves.items()}
    compressor = BaseCompressor.get_value_from_registry(quantization["format"])
    return as_bf16(compressor.decompress(state, scheme)["weight"])


def gpt_oss(hidden: int = 64, inner: int = 96, count: int = 3) -> LowBits:
    tensors: Tensors = {}
    values: Tensors = {}
    for seed, (leaf, n, k) in enumerate((("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner))):
        name = f"{EXPERTS}.{leaf}"
        blocks, scale = codes((count, n, k // 32, 16), seed), exponents((count, n, k // 32), seed)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scale, f"{name}_bias": random_weight((count, n), seed)}
        values[name] = as_bf16(convert_moe_packed_tensors(torch.from_numpy(blocks), torch.from_numpy(scale)))
    model = {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "hidden_size": hidden}
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    return LowBits(tensors, quantization, values, "e2m1", "block:32x1", model)


def integers(
    bits: int, strategy: dict[str, Any], shape: tuple[int, int] = (N, K), *, symmetric: bool = True, packed: bool = True
) -> LowBits:
    """INT4 or INT8 of compressed-tensors; every value is there, and with `symmetric` no zero point."""
    n, k = shape
    size = strategy.get("group_size")
    grid = (1, 1) if strategy["strategy"] == "tensor" else (n, -(-k // size) if size else 1)
    half, random = 1 << bits - 1, np.random.default_rng(3)
    weight = random.integers(-half, half, shape).astype(np.int8)
    zero_points = random.integers(-half, half, grid).astype(np.int8)
    leaves: Tensors = {"weight": weight, "weight_scale": scales(grid)}
    if packed:
        del leaves["weight"]
        leaves["weight_packed"] = pack_to_int32(torch.from_numpy(weight), bits).numpy()
        leaves["weight_shape"] = np.array(shape, np.int64)
    if not symmetric:
        zeros = pack_to_int32(torch.from_numpy(zero_points), bits, packed_dim=0).numpy() if packed else zero_points
        leaves["weight_zero_point"] = zeros
    arguments = {"num_bits": bits, "type": "int", "symmetric": symmetric, **strategy}
    quantization = groups(arguments, None, "pack-quantized" if packed else "int-quantized")
    granularity = f"group:{size}" if size else strategy["strategy"]
    return case(leaves, quantization, decompressed(leaves, quantization), f"int{bits}", granularity)


def mxfp4() -> LowBits:
    leaves: Tensors = {"weight_packed": codes((N, K // 2)), "weight_scale": exponents((N, K // 32))}
    arguments = {"num_bits": 4, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
    quantization = groups(arguments, None, "mxfp4-pack-quantized")
    return case(leaves, quantization, decompressed(leaves, quantization), "e2m1", "mx")


def nvfp4() -> LowBits:
    leaves: Tensors = {
        "weight_packed": codes((N, K // 2)),
        "weight_scale": scales((N, K // 16), dtype=E4M3),
        "weight_global_scale": np.array([2688 / 3.1], np.float32),
        "input_global_scale": np.array([17.0], np.float32),
    }
    arguments = {"num_bits": 4, "strategy": "tensor_group", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"}
    quantization = groups(arguments, None, "nvfp4-pack-quantized")
    return case(leaves, quantization, decompressed(leaves, quantization), "e2m1", "group:16")


def e2m1(packed: NDArray[Any]) -> NDArray[np.float32]:
    """FP4 of two to a byte, the lower nibble first, by the casts of ml_dtypes."""
    nibbles = np.stack([packed.view(np.uint8) & 15, packed.view(np.uint8) >> 4], -1)
    return nibbles.view(ml_dtypes.float4_e2m1fn).astype(np.float32).reshape(packed.shape[0], -1)


def modelopt_nvfp4() -> LowBits:
    """Value = e2m1 * (scale * scale_2), all in float32: NVFP4QTensor.dequantize."""
    packed, scale = codes((N, K // 2)), scales((N, K // 16), dtype=E4M3)
    second = np.float32(0.0123).reshape(())
    leaves: Tensors = {"weight": packed, "weight_scale": scale, "weight_scale_2": second}
    leaves["input_scale"] = np.float32(0.5).reshape(())
    values = e2m1(packed) * np.repeat(scale.astype(np.float32) * second, 16, 1)
    quantization = MODELOPT | {"quant_algo": "NVFP4", "group_size": 16}
    return case(leaves, quantization, values.astype(BF16), "e2m1", "group:16")


def quark_mxfp4() -> LowBits:
    packed, scale = codes((N, K // 2)), exponents((N, K // 32))
    values = e2m1(packed) * np.repeat(np.exp2(scale.astype(np.float32) - 127), 32, 1)
    weight = {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0"}
    leaves: Tensors = {"weight": packed, "weight_scale": scale}
    return case(leaves, quark(weight, None), values.astype(BF16), "e2m1", "mx")


def deepseek_v4() -> LowBits:
    """FP4 experts alone: beside them FP8 linears lie as in other cases."""
    packed, scale = codes((N, K // 2)).view(np.int8), exponents((N, K // 32)).view(E8M0)
    dequantize = Fp8Dequantize(None)._dequantize_one
    values = dequantize(torch.from_numpy(packed), torch.from_numpy(scale.view(np.uint8)), torch.bfloat16)
    tensors: Tensors = {f"{EXPERTS}.0.w1.weight": packed, f"{EXPERTS}.0.w1.scale": scale}
    weights = {f"{EXPERTS}.0.w1.weight": as_bf16(values)}
    return LowBits(tensors, BLOCKS | {"expert_dtype": "fp4"}, weights, "e2m1", "mx", {"model_type": "deepseek_v4"})


GROUP, CHANNEL, TENSOR = {"strategy": "group", "group_size": 32}, {"strategy": "channel"}, {"strategy": "tensor"}
CASES: dict[str, Callable[[], LowBits]] = {
    "gpt-oss": gpt_oss,
    "INT4, group": lambda: integers(4, GROUP),
    "INT4, channel": lambda: integers(4, CHANNEL),
    "INT4, tensor": lambda: integers(4, TENSOR),
    "INT4, K of 20": lambda: integers(4, CHANNEL, (48, 20)),
    "INT4, K of 21": lambda: integers(4, CHANNEL, (47, 21)),
    "INT4, asymmetric, group": lambda: integers(4, GROUP, symmetric=False),
    "INT4, asymmetric, channel, N of 45": lambda: integers(4, CHANNEL, (45, 64), symmetric=False),
    "INT8, group": lambda: integers(8, GROUP),
    "INT8, K of 21": lambda: integers(8, CHANNEL, (47, 21)),
    "INT8, asymmetric, group, N of 45": lambda: integers(8, GROUP, (45, 64), symmetric=False),
    "INT8, not packed": lambda: integers(8, CHANNEL, packed=False),
    "INT8, not packed, tensor": lambda: integers(8, TENSOR, packed=False),
    "INT8, not packed, asymmetric": lambda: integers(8, CHANNEL, symmetric=False, packed=False),
    "NVFP4 of compressed-tensors": nvfp4,
    "NVFP4 of ModelOpt": modelopt_nvfp4,
    "MXFP4 of compressed-tensors": mxfp4,
    "MXFP4 of Quark": quark_mxfp4,
    "DeepSeek-V4": deepseek_v4,
}
