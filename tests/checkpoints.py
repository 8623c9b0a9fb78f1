"""Small checkpoints for the tests."""

from collections.abc import Callable
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
    values = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32) * np.float32(0.02)
    return np.ascontiguousarray(values.astype(dtype))


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
