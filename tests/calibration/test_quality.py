"""What calibration is for: the demo model with static per-tensor weights and activations loses next to nothing."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import verbs
from checkpoints import DEMO

import fp8pack
from fp8pack.packing.options import WriteOptions
from fp8pack.planning.recipe import Request

pytestmark = pytest.mark.slow


def test_static_w8a8_of_the_demo_model_keeps_its_perplexity(tmp_path: Path) -> None:
    calibration, output = tmp_path / "calibration.safetensors", tmp_path / "packed"
    fp8pack.calibrate(DEMO, calibration, num_prompts=128)
    verbs.pack(DEMO, Request(scheme="FP8", calibration=calibration), WriteOptions(output=output))
    program = Path(__file__).parents[2] / "examples" / "compare_demo.py"
    done = subprocess.run([sys.executable, program, output], capture_output=True, text=True, check=True)
    found = re.search(r"\+ static activations\s+\S+\s+/ BF16 (\S+)\s+95 % (\S+) to (\S+)", done.stdout)
    assert found, done.stdout
    ratio, low, high = map(float, found.groups())
    assert 0.99 < low < ratio < high < 1.02
    assert ratio <= 1.01
