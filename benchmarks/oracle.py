"""Pack a small model in every granularity and format, and compare each byte with ml_dtypes; prints one JSON document.

The oracle shares no code with fp8pack: NumPy divides in float32, ml_dtypes rounds to FP8, and the files are written and
read here. The weights hold what is hard: ragged edges, zero rows, subnormals, ties, outliers, three dtypes.

    python benchmarks/oracle.py WORK
"""

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
GRANULARITIES = ("tensor", "channel", "group:64", "block:128x128", "mx")
FORMATS = {"e4m3": (ml_dtypes.float8_e4m3fn, 448.0), "e5m2": (ml_dtypes.float8_e5m2, 57344.0)}
SHAPES = ((384, 512), (300, 200), (129, 96), (1, 640), (257, 1), (64, 1000))
DTYPES = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}
SAVED_AS = {"BF16": np.dtype(np.uint16), "F16": np.dtype(np.uint16), "F32": np.dtype(np.uint32)}
MIN_SCALE = np.float32(2.0**-126)


def make_weights() -> dict[str, tuple[str, Array]]:
    """Return weights by name, each with its dtype; no two of them are fused by any engine."""
    rng = np.random.default_rng(7)
    weights: dict[str, tuple[str, Array]] = {}
    for layer, shape in enumerate(SHAPES):
        for dtype, leaf in zip(DTYPES, ("self_attn.o_proj", "mlp.down_proj", "mlp.fc2"), strict=True):
            values = rng.standard_normal(shape, np.float32) * np.float32(0.02)
            values *= rng.choice(np.array([1, 1, 1, 2.0**-9, 40], np.float32), shape)
            values[:: max(1, shape[0] // 3)] = 0
            values.flat[:: max(1, values.size // 50)] = (
                rng.integers(-224, 225, values.flat[:: max(1, values.size // 50)].shape) / 64
            )
            if dtype != "F16":
                values[-1] *= np.float32(2.0**-120)
            weights[f"model.layers.{layer}.{leaf}.weight"] = (dtype, values.astype(DTYPES[dtype]))
    return weights


def write_model(folder: Path, weights: dict[str, tuple[str, Array]]) -> None:
    """Write the weights as a checkpoint of one safetensors file."""
    folder.mkdir(parents=True)
    header: dict[str, Any] = {}
    end = 0
    for name, (dtype, values) in weights.items():
        header[name] = {"dtype": dtype, "shape": values.shape, "data_offsets": [end, end + values.nbytes]}
        end += values.nbytes
    raw = json.dumps(header).encode()
    data = b"".join(values.tobytes() for _, values in weights.values())
    (folder / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": len(SHAPES)}
    (folder / "config.json").write_text(json.dumps(config))


def read_file(path: Path) -> dict[str, tuple[str, Array]]:
    """Return dtype and raw bytes of every tensor of a safetensors file."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    return {
        name: (entry["dtype"], np.frombuffer(data, np.uint8)[slice(*(8 + length + o for o in entry["data_offsets"]))])
        for name, entry in header.items()
    }


def expect(weight: Array, granularity: str, format: str) -> tuple[Array, Array]:
    """Return payload and stored scales of a weight as raw bytes."""
    rows, cols = _region(granularity, weight.shape)
    element, largest = FORMATS[format]
    x = weight.astype(np.float32)
    (n, k), (down, across) = x.shape, (-(-x.shape[0] // rows), -(-x.shape[1] // cols))
    padded = np.zeros((down * rows, across * cols), np.float32)
    padded[:n, :k] = np.abs(x)
    amax = padded.reshape(down, rows, across, cols).max(axis=(1, 3))
    scales = np.maximum(amax / np.float32(largest), MIN_SCALE)
    if granularity == "mx":
        mantissa, exponent = np.frexp(scales)
        scales = np.ldexp(np.float32(1), exponent - (mantissa == 0.5)).astype(np.float32)
    scales = np.where(amax == 0, np.float32(1), scales)
    spread = np.repeat(np.repeat(scales, rows, axis=0), cols, axis=1)[:n, :k]
    payload = np.clip(x / spread, -np.float32(largest), np.float32(largest)).astype(element)
    stored = (np.frexp(scales)[1] - 1 + 127).astype(np.uint8) if granularity == "mx" else scales
    return payload.view(np.uint8).ravel(), np.ascontiguousarray(stored).view(np.uint8).ravel()


def _region(granularity: str, shape: tuple[int, ...]) -> tuple[int, int]:
    fixed = {"tensor": shape, "channel": (1, shape[1]), "mx": (1, 32)}
    if granularity in fixed:
        return fixed[granularity][0], fixed[granularity][1]
    numbers = [int(part) for part in granularity.partition(":")[2].split("x")]
    return (1, numbers[0]) if len(numbers) == 1 else (numbers[0], numbers[1])


def compare(work: Path, weights: dict[str, tuple[str, Array]], granularity: str, format: str) -> dict[str, Any]:
    """Pack the model and count the bytes of payloads and scales that the oracle gives as well."""
    output = work / f"{granularity.replace(':', '-')}-{format}"
    command = ["fp8pack", "pack", str(work / "model"), "-o", str(output), "--quant-method", "fp8pack"]
    subprocess.run(
        [*command, "--granularity", granularity, "--format", format, "--quiet"], check=True, stdout=subprocess.DEVNULL
    )
    packed = read_file(output / "model.safetensors")
    total, equal, differing = 0, 0, []
    for name, (_, weight) in weights.items():
        for part, expected in zip((name, f"{name}_scale_inv"), expect(weight, granularity, format), strict=True):
            found = packed[part][1] if part in packed else np.empty(0, np.uint8)
            same = int((found == expected).sum()) if found.size == expected.size else 0
            total, equal = total + expected.size, equal + same
            differing += [part] if same != expected.size else []
    return {"granularity": granularity, "format": format, "bytes": total, "equal": equal, "differing": differing}


def main() -> None:
    """Read the argument, compare everything, print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    work = parser.parse_args().work
    weights = make_weights()
    write_model(work / "model", weights)
    print(json.dumps([compare(work, weights, g, f) for g in GRANULARITIES for f in FORMATS], indent=2))


if __name__ == "__main__":
    main()
