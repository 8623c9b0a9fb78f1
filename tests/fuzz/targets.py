"""What is fuzzed: every parser of what may be hostile, each as a function of bytes.

A target returns for input that is refused with a sentence, and for input that is accepted; anything else is a finding.
"""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import safetensors
from safetensors.numpy import save

from fp8pack.checkpoint.calibration_file import read_calibration
from fp8pack.checkpoint.header import parse_header
from fp8pack.checkpoint.quantized import read_contents
from fp8pack.checkpoint.source import open_checkpoint
from fp8pack.checkpoint.whole import check_files
from fp8pack.errors import Fp8PackError
from fp8pack.modelrun.prompts import load_prompts
from fp8pack.packing.model_card import strip_card
from fp8pack.planning.recipe_file import make_request

Target = Callable[[bytes], object]
_MOST_DATA = 1 << 16
_FOLDER = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))


def header(data: bytes) -> None:
    """A header; what is accepted, the safetensors library accepts, with the same names, dtypes and shapes."""
    try:
        entries = json.loads(data)
        ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
        end = max((end for end in ends if isinstance(end, int) and 0 <= end <= _MOST_DATA), default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        end = 0
    size = 8 + len(data) + end
    try:
        found = parse_header(data, "fuzzed", size)
    except Fp8PackError:
        return
    theirs = dict(safetensors.deserialize(len(data).to_bytes(8, "little") + data + bytes(end)))
    assert {spec.name: list(spec.shape) for spec in found.tensors} == {n: e["shape"] for n, e in theirs.items()}


def _checkpoint(name: str) -> Path:
    folder = _FOLDER / name
    folder.mkdir()
    tensors = {"model.layers.0.mlp.up_proj.weight": np.zeros((32, 32), np.float16), "norm.weight": np.zeros(3)}
    (folder / "weights.safetensors").write_bytes(save(tensors))
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}')
    return folder


def _opens(folder: Path, file: str) -> Target:
    def target(data: bytes) -> None:
        (folder / file).write_bytes(data)
        try:
            source = open_checkpoint(folder)
            read_contents(source)
            assert source.facts
        except Fp8PackError:
            return

    return target


def _of_file(name: str, read: Callable[[Path], object]) -> Target:
    path = _FOLDER / name

    def target(data: bytes) -> None:
        path.write_bytes(data)
        try:
            read(path)
        except Fp8PackError:
            return

    return target


def card(data: bytes) -> None:
    """A model card, of which any text is one."""
    strip_card(data.decode(errors="replace"))


TARGETS: dict[str, Target] = {
    "header": header,
    "index": _opens(_checkpoint("index"), "model.safetensors.index.json"),
    "config": _opens(_checkpoint("config"), "config.json"),
    "manifest": _of_file("fp8pack.json", check_files),
    "calibration": _of_file("calibration.safetensors", read_calibration),
    "recipe": _of_file("recipe.yaml", make_request),
    "prompts": _of_file("prompts.jsonl", lambda path: load_prompts([str(path)], 8)),
    "card": card,
}
