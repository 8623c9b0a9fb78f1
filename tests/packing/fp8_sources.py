"""FP8 checkpoints to convert and to unpack, written without fp8pack."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import oracle
import verbs
from checkpoints import Tensors, llama_config, random_weight, read_tensors, write_model
from numpy.typing import NDArray

from fp8pack.numerics.granularity import parse_granularity
from fp8pack.packing.options import WriteOptions
from fp8pack.planning.recipe import Request

E4M3, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16
LAYER = "model.layers.0"
ATTENTION = f"{LAYER}.self_attn"
LINEARS = {
    f"{ATTENTION}.q_proj": (256, 256),
    f"{ATTENTION}.k_proj": (128, 256),
    f"{ATTENTION}.v_proj": (128, 256),
    f"{ATTENTION}.o_proj": (256, 256),
    f"{LAYER}.mlp.gate_proj": (384, 256),
    f"{LAYER}.mlp.up_proj": (384, 256),
    f"{LAYER}.mlp.down_proj": (256, 384),
}
WEIGHTS = [f"{module}.weight" for module in LINEARS]


def config_of(**more: Any) -> dict[str, Any]:
    return llama_config(layers=1) | {"hidden_size": 256} | more


def float_weights(shapes: dict[str, tuple[int, int]] | None = None) -> Tensors:
    return {
        f"{module}.weight": random_weight(shape, i) for i, (module, shape) in enumerate((shapes or LINEARS).items())
    }


def others() -> Tensors:
    return {
        "model.embed_tokens.weight": random_weight((32, 256), 50),
        f"{LAYER}.input_layernorm.weight": random_weight((256,), 51),
        f"{LAYER}.mlp.gate.weight": random_weight((4, 256), 52),
        "lm_head.weight": random_weight((32, 256), 53),
    }


def quantized(
    granularity: str, rounding: str = "none", format: str = "e4m3", shapes: dict[str, tuple[int, int]] | None = None
) -> dict[str, tuple[NDArray[Any], NDArray[np.float32]]]:
    """Payload and scales of each weight, by the oracle."""
    return dict(_quantized(granularity, rounding, format, tuple((shapes or LINEARS).items())))


@cache
def _quantized(
    granularity: str, rounding: str, format: str, shapes: tuple[tuple[str, tuple[int, int]], ...]
) -> dict[str, tuple[NDArray[Any], NDArray[np.float32]]]:
    found = {}
    for name, weight in float_weights(dict(shapes)).items():
        codes, scales = oracle.quantize(weight.astype(np.float32), format, granularity, rounding)
        codes.flags.writeable = scales.flags.writeable = False  # every test gets the same
        found[name] = (codes.view(oracle.ELEMENT[format][0]), scales)
    return found


def source_of(
    folder: Path,
    granularity: str,
    activations: str = "dynamic",
    rounding: str = "none",
    format: str = "e4m3",
    *,
    shapes: dict[str, tuple[int, int]] | None = None,
    shards: int = 1,
    extra: Tensors | None = None,
) -> Path:
    """A checkpoint of fp8pack's own convention, written without fp8pack."""
    tensors = others() | (extra or {})
    for i, (name, (codes, scales)) in enumerate(quantized(granularity, rounding, format, shapes).items()):
        exponents = granularity == "mx" or rounding == "up"
        grid = scales.reshape(()) if granularity == "tensor" else scales
        stored = scales.astype(ml_dtypes.float8_e8m0fnu).view(np.uint8) if granularity == "mx" else grid
        tensors |= {name: codes, f"{name}_scale_inv": stored}
        if activations == "static":
            tensors[f"{name.removesuffix('.weight')}.input_scale"] = np.float32(0.5 + i).reshape(())
    quantization = {
        "quant_method": "fp8pack",
        "format": format,
        "granularity": granularity,
        "activation_scheme": activations,
        **({"scale_fmt": "ue8m0"} if exponents and granularity != "mx" else {}),
    }
    return write_model(folder, tensors, config_of(quantization_config=quantization), shards=shards)


def as_bytes(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {name: (str(t.dtype), t.shape, t.tobytes()) for name, t in read_tensors(folder).items()}


def asked(granularity: str | None = None, method: str | None = None, **changes: Any) -> Request:
    return Request(granularity=parse_granularity(granularity) if granularity else None, quant_method=method, **changes)


def convert(source: Path, output: Path, request: Request, **options: Any) -> Tensors:
    verbs.convert(source, request, WriteOptions(output, **options))
    return read_tensors(output)


def request_for(spelling: str) -> Request:
    if spelling == "fp8 for transformers":
        return Request(quant_method="fp8", targets=("transformers",))
    return Request(quant_method=spelling)


def config_text(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text()))
