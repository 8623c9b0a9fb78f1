"""Calibration on a CUDA device: the same sites and tokens as on a CPU, and what the device itself computed."""

from pathlib import Path

import pytest
import torch
import verbs
from checkpoints import DEMO

import fp8pack
from fp8pack.calibration.options import CalibrateOptions
from fp8pack.checkpoint.calibration_file import read_calibration

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("stream_layers", ["off", "on"])
def test_the_device_finds_the_sites_of_the_cpu(tmp_path: Path, stream_layers: str) -> None:
    found = []
    for device in ("cpu", "cuda"):
        output = tmp_path / f"{device}.safetensors"
        options = CalibrateOptions(output=output, num_prompts=16, device=device, stream_layers=stream_layers)
        verbs.calibrate(DEMO, options)
        found.append(read_calibration(output))
    on_cpu, on_device = found
    assert on_cpu.prompts == on_device.prompts
    for expected, site in zip(on_cpu.sites, on_device.sites, strict=True):
        assert (site.points, site.tokens) == (expected.points, expected.tokens)
        assert site.amax == pytest.approx(expected.amax, rel=0.2)
        assert site.mean_square == pytest.approx(expected.mean_square, rel=0.05)


def test_what_is_recorded_is_what_the_device_computed() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(512, 64, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(3, 7, 512, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad(), fp8pack.observe(model) as observation:
        model(x)
    (site,) = observation.calibration().sites
    assert site.amax == x.abs().max().item()
    assert site.channel_squares == pytest.approx((x.double() ** 2).sum((0, 1)).cpu().numpy(), rel=1e-12)
