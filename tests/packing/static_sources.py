"""Calibrations computed by hand, and readers of what was packed with them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

import fp8pack
from fp8pack.checkpoint.calibration_file import write_calibration
from fp8pack.checkpoint.source import open_checkpoint
from fp8pack.planning.calibration import Calibration, Site

# What enters the linears of a layer, and K and V: the amax of each of three prompts, times the number of the layer + 1.
HISTORIES = {
    "input_layernorm.output": (3.0, 7.0, 5.0),
    "self_attn.k": (10.0, 12.0, 11.0),
    "self_attn.v": (1.5, 0.5, 1.25),
    "self_attn.o_proj.input": (1.0, 2.0, 1.0),
    "post_attention_layernorm.output": (20.0, 2.0, 40.0),
    "mlp.down_proj.input": (128.0, 4.0, 130.0),
}
POINTS = {
    "input_layernorm.output": ("self_attn.k_proj.input", "self_attn.q_proj.input", "self_attn.v_proj.input"),
    "post_attention_layernorm.output": ("mlp.gate_proj.input", "mlp.up_proj.input"),
}


def bits(value: float) -> int:
    """The BF16 magnitude of a value that BF16 holds exactly."""
    rounded = np.array(value, ml_dtypes.bfloat16)
    assert float(rounded) == value
    return int(rounded.view(np.uint16)) & 0x7FFF


def site(points: Sequence[str], history: Sequence[float], tokens: int = 64) -> Site:
    """A site of one channel that saw the amax of each prompt, and zeros."""
    seen = sorted(set(history) - {0.0})
    bins, counts = [0, *map(bits, seen)], [tokens - len(seen), *[1] * len(seen)]
    top = np.array([bins[-1]], np.uint16)
    prompts = np.array([bits(value) for value in history], np.uint16)
    return Site(tuple(points), tokens, np.array(bins, np.uint16), np.array(counts, np.int64), top, np.ones(1), prompts)


def llama_sites(layers: int = 2, factor: float = 1.0) -> list[Site]:
    return [
        site(
            [f"model.layers.{i}.{name}" for name in (first, *POINTS.get(first, ()))],
            [value * (i + 1) * factor for value in history],
        )
        for i in range(layers)
        for first, history in HISTORIES.items()
    ]


def calibrate(
    source: Path, name: str = "calibration", sites: Sequence[Site] | None = None, fingerprint: str | None = None
) -> Path:
    """Write a calibration of a checkpoint by hand."""
    prompts = ("blake3:a", "blake3:b", "blake3:c")
    of_model = open_checkpoint(source).fingerprint if fingerprint is None else fingerprint
    found = llama_sites() if sites is None else sites
    path = source.parent / f"{name}.safetensors"
    write_calibration(path, Calibration(of_model, prompts, {"max_length": 64}, tuple(found)))
    return path


def stored(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Dtype, shape and bytes of every tensor of a directory, read with nothing but json."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        raw = path.read_bytes()
        begin = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:begin])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            lo, hi = entry["data_offsets"]
            found[name] = (entry["dtype"], tuple(entry["shape"]), raw[begin + lo : begin + hi])
    return found


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def pack_static(source: Path, output: Path, calibration: Path, scheme: str = "FP8", **asked: Any) -> dict[str, Any]:
    return fp8pack.pack(source, output, scheme=scheme, calibration=calibration, **asked)
