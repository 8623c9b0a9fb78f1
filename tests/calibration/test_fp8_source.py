"""An FP8 checkpoint is calibrated dequantized: the model runs with the weights that its scales give."""

from pathlib import Path
from typing import Any

import pytest
import torch
import verbs
from checkpoints import DEMO

import fp8pack
from fp8pack.calibration.options import CalibrateOptions
from fp8pack.checkpoint.source import open_checkpoint
from fp8pack.modelrun.loader import ModelLoader
from fp8pack.numerics.granularity import parse_granularity
from fp8pack.packing.options import WriteOptions
from fp8pack.planning.recipe import Request


@pytest.mark.parametrize(
    "asked",
    [
        {"scheme": "FP8_BLOCK"},
        {"scheme": "FP8_BLOCK", "quant_method": "fp8pack"},
        {"scheme": "FP8_DYNAMIC"},
        {"scheme": "MXFP8"},
        {"granularity": parse_granularity("tensor")},
    ],
    ids=lambda asked: " ".join(str(value) for value in asked.values()),
)
def test_the_weights_that_run_are_the_dequantized_ones(asked: dict[str, Any], tmp_path: Path) -> None:
    verbs.pack(DEMO, Request(**asked), WriteOptions(output=tmp_path / "packed"))
    packed = fp8pack.load_packed(tmp_path / "packed")
    loader = ModelLoader(open_checkpoint(tmp_path / "packed"), trust_remote_code=False, device=torch.device("cpu"))
    loader.load_all()
    weights = {name: tensor for name, tensor in packed.items() if isinstance(tensor, fp8pack.PackedTensor)}
    assert len(weights) == 28
    for name, weight in weights.items():
        assert torch.equal(loader.model.get_parameter(name), weight.dequantize()), name


def test_its_statistics_are_close_to_those_of_its_source(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"text": "def f{i}(x): return x + {i}"}}\n' for i in range(8)))
    verbs.pack(DEMO, Request(), WriteOptions(output=tmp_path / "packed"))
    widest = []
    for i, model in enumerate((DEMO, tmp_path / "packed")):
        options = CalibrateOptions(output=tmp_path / f"{i}.safetensors", prompts=str(prompts), num_prompts=8)
        facts = verbs.calibrate(model, options)
        widest.append({site.points[0]: site.rms for site in facts.widest})
    common = widest[0].keys() & widest[1].keys()
    assert len(common) >= 7
    assert all(abs(widest[1][point] / widest[0][point] - 1) < 0.1 for point in common)
    assert widest[0] != widest[1]
