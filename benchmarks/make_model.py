"""Make a synthetic Llama checkpoint: real names and shapes, random BF16 weights, no framework needed.

python benchmarks/make_model.py OUT --size 4GiB --shards 4
python benchmarks/make_model.py OUT --one-tensor 8GiB
python benchmarks/make_model.py OUT --small-tensors 45000
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fp8pack.checkpoint.header import build_header
from fp8pack.inputs import parse_size
from fp8pack.modelfacts.spec import Stored

HIDDEN, INTERMEDIATE, VOCAB = 4096, 11008, 32000
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
NORMS = ("input_layernorm", "post_attention_layernorm")
_NOISE_ELEMENTS = 16 << 20

Shapes = dict[str, tuple[int, ...]]


def llama(nbytes: int) -> Iterator[Shapes]:
    """Yield what stays in one shard: the embeddings, each layer up to about `nbytes` in all, the rest."""
    yield {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    layer_nbytes = 2 * sum(n * k for n, k in LINEARS.values())
    num_layers = max(1, round((nbytes - 4 * VOCAB * HIDDEN) / layer_nbytes))
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}"
        yield {f"{prefix}.{name}.weight": shape for name, shape in LINEARS.items()} | {
            f"{prefix}.{name}.weight": (HIDDEN,) for name in NORMS
        }
    yield {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}


def write_model(folder: Path, groups: list[Shapes], shards: int) -> None:
    """Write the groups into shards of about equal size, with config.json and an index."""
    folder.mkdir(parents=True)
    total = sum(2 * int(np.prod(shape)) for group in groups for shape in group.values())
    files: list[Shapes] = [{}]
    written = 0
    for group in groups:
        if written >= total * len(files) / shards and len(files) < shards:
            files.append({})
        files[-1] |= group
        written += sum(2 * int(np.prod(shape)) for shape in group.values())
    noise = _noise()
    names = (
        [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
        if len(files) > 1
        else ["model.safetensors"]
    )
    for name, shapes in zip(names, files, strict=True):
        _write_shard(folder / name, shapes, noise)
    if len(files) > 1:
        weight_map = {tensor: name for name, shapes in zip(names, files, strict=True) for tensor in shapes}
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
        )
    layers = 1 + max((int(name.split(".")[2]) for group in groups for name in group if ".layers." in name), default=0)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": HIDDEN,
    }
    config |= {
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "intermediate_size": INTERMEDIATE,
        "vocab_size": VOCAB,
    }
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}, indent=2))


def _write_shard(path: Path, shapes: Shapes, noise: NDArray[np.uint16]) -> None:
    stored = [Stored(name, "BF16", shape) for name, shape in shapes.items()]
    begins = np.cumsum([0, *(tensor.nbytes for tensor in stored)])[:-1].tolist()
    with path.open("wb") as file:
        file.write(build_header(stored, begins, {"format": "pt"}))
        offset = 0
        for tensor in stored:
            left = tensor.nbytes // 2
            while left:
                part = noise[offset : offset + left]
                file.write(part.tobytes())
                left -= part.size
                offset = (offset + part.size + 977) % (noise.size // 2)


def _noise() -> NDArray[np.uint16]:
    values = np.random.default_rng(0).standard_normal(_NOISE_ELEMENTS, dtype=np.float32) * 0.02
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def main() -> None:
    """Read the arguments and write the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", default="4GiB")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--one-tensor", default=None)
    parser.add_argument("--small-tensors", type=int, default=0)
    args = parser.parse_args()
    if args.one_tensor:
        groups: list[Shapes] = [
            {"model.layers.0.mlp.up_proj.weight": (parse_size("size", args.one_tensor) // (2 * 8192), 8192)}
        ]
    elif args.small_tensors:
        groups = [
            {f"model.layers.{i // 128}.mlp.experts.{i % 128}.up_proj.weight": (128, 128)}
            for i in range(args.small_tensors)
        ]
    else:
        groups = list(llama(parse_size("size", args.size)))
    write_model(args.out, groups, 1 if args.one_tensor else args.shards)


if __name__ == "__main__":
    main()
