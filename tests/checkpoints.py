"""Small checkpoints for the tests."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Tensors = dict[str, NDArray[Any]]
MakeCheckpoint = Callable[..., Path]
DEMO = Path(__file__).parents[1] / "examples" / "demo-qwen3"

LLAMA_LAYER = {
    "input_layernorm": (256,),
    "mlp.down_proj": (256, 512),
    "mlp.gate_proj": (512, 256),
    "mlp.up_proj": (512, 256),
    "post_attention_layernorm": (256,),
    "self_attn.k_proj": (128, 256),
    "self_attn.o_proj": (256, 256),
    "self_attn.q_proj": (256, 256),
    "self_attn.v_proj": (128, 256),
}


def random_weight(shape: tuple[int, ...], seed: int = 0, dtype: Any = ml_dtypes.bfloat16) -> NDArray[Any]:
    """Normal weights of standard deviation 0.02."""
    return _random_weight(shape, seed, dtype).copy()


@cache
def _random_weight(shape: tuple[int, ...], seed: int, dtype: Any) -> NDArray[Any]:
    values = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32) * np.float32(0.02)
    return values.astype(dtype)


def llama_tensors(layers: int = 2, dtype: Any = ml_dtypes.bfloat16) -> Tensors:
    """The tensors of a tiny Llama-like model whose linears are all multiples of 128."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (384, 256)}
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in LLAMA_LAYER.items()}
    shapes |= {"model.norm.weight": (256,), "lm_head.weight": (384, 256)}
    return {name: random_weight(shape, seed, dtype) for seed, (name, shape) in enumerate(shapes.items())}


def llama_config(architecture: str = "Qwen3ForCausalLM", layers: int = 2) -> dict[str, Any]:
    """A config.json that goes with `llama_tensors`."""
    return {
        "architectures": [architecture],
        "model_type": "qwen3",
        "hidden_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "num_hidden_layers": layers,
        "rms_norm_eps": 1e-06,
        "dtype": "bfloat16",
    }


_SAFETENSORS: dict[str, Any] = {
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "BF16": ml_dtypes.bfloat16,
    "F16": np.float16,
    "F32": np.float32,
    "U8": np.uint8,
    "I8": np.int8,
    "I32": np.int32,
    "I64": np.int64,
    "BOOL": np.bool_,
}


def write_shard(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> None:
    """Write one safetensors file, FP8 and exponents included, without the library."""
    names = {np.dtype(dtype): name for name, dtype in _SAFETENSORS.items()}
    entries: dict[str, Any] = {"__metadata__": metadata or {"format": "pt"}}
    position = 0
    for name, tensor in tensors.items():
        end = position + tensor.nbytes
        entries[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(entries).encode()
    data = b"".join(np.ascontiguousarray(tensor).tobytes() for tensor in tensors.values())
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


def write_model(
    folder: Path,
    tensors: Tensors,
    config: dict[str, Any] | None = None,
    *,
    shards: int = 1,
    metadata: dict[str, str] | None = None,
) -> Path:
    """Write a model directory, every n-th tensor into the n-th shard; without a config there is no config.json."""
    folder.mkdir(parents=True)
    names = list(tensors)
    files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    files = files if shards > 1 else ["model.safetensors"]
    for i, file in enumerate(files):
        write_shard(folder / file, {name: tensors[name] for name in names[i::shards]}, metadata)
    if shards > 1:
        index = {"metadata": {}, "weight_map": {name: files[i % shards] for i, name in enumerate(names)}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def read_tensors(path: Path) -> Tensors:
    """Every tensor of a safetensors file, or of all in a directory, read without the library."""
    found: Tensors = {}
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        raw = file.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        for name, entry in json.loads(raw[8:start]).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                data = np.frombuffer(raw[start + begin : start + end], _SAFETENSORS[entry["dtype"]])
                found[name] = data.reshape(entry["shape"])
    return found
