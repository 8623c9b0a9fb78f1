"""The inputs that fuzzing starts from."""

import json
import tempfile
from pathlib import Path

import numpy as np
from checkpoints import llama_config, llama_tensors
from safetensors.numpy import save_file

import fp8pack
from fp8pack.checkpoint.calibration_file import write_calibration
from fp8pack.planning.calibration import Calibration, Site

RECIPE = """scheme: FP8_BLOCK
ignore: ["lm_head", "re:.*router$"]
rules:
  - match: "*.down_proj"
    action: keep
"""
PROMPTS = '{"text": "one"}\n{"messages": [{"role": "user", "content": [{"type": "text", "text": "two"}]}]}\n'
CARD = "---\nlicense: mit\ntags:\n- a\nbase_model: x/y\n---\n\n# A model\n\ntext\n"


def make_corpus() -> dict[str, list[bytes]]:
    """Return whole inputs of each target, as fp8pack writes them, and small ones."""
    with tempfile.TemporaryDirectory() as place:
        model = Path(place) / "model"
        model.mkdir()
        save_file(llama_tensors(1), model / "model.safetensors", {"format": "pt"})
        (model / "config.json").write_text(json.dumps(llama_config(layers=1)))
        fp8pack.pack(model, Path(place) / "out", scheme="FP8_BLOCK")
        shard = (Path(place) / "out" / "model.safetensors").read_bytes()
        data = 8 + int.from_bytes(shard[:8], "little")
        magnitudes = np.array([0x3F80], np.uint16)
        site = Site(("a.input",), 3, magnitudes, np.array([3]), magnitudes, np.array([3.0]), magnitudes)
        write_calibration(Path(place) / "c.safetensors", Calibration("", ("blake3:" + "0" * 64,), {}, (site,)))
        return {
            "header": [shard[8:data], b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'],
            "cpp": [shard[:data], shard],
            "index": [
                b'{"metadata":{},"weight_map":{"norm.weight":"weights.safetensors","model.layers.0.mlp.up_proj.weight":"weights.safetensors"}}'
            ],
            "config": [(Path(place) / "out" / "config.json").read_bytes(), json.dumps(llama_config()).encode()],
            "manifest": [(Path(place) / "out" / "fp8pack.json").read_bytes()],
            "calibration": [(Path(place) / "c.safetensors").read_bytes()],
            "recipe": [RECIPE.encode()],
            "prompts": [PROMPTS.encode()],
            "card": [CARD.encode(), (Path(place) / "out" / "README.md").read_bytes()],
        }
