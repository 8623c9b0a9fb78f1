"""Predicted outputs: exact where its assumptions hold, and on the demo model as far as docs/numerics.md says."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import DEMO
from typer.testing import CliRunner

import fp8pack
from fp8pack.cli.app import app
from fp8pack.numerics.metrics import OutputTally


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calibration") / "c.safetensors"
    fp8pack.calibrate(DEMO, path, num_prompts=24, max_length=64)
    return path


def test_independent_channels_are_predicted_exactly() -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((64, 48)).astype(np.float32)
    rounded = weight + 0.02 * rng.standard_normal((64, 48)).astype(np.float32)
    spread = np.exp(rng.uniform(-2, 2, 48))
    x = rng.standard_normal((200_000, 48)) * spread
    tally = OutputTally((x**2).mean(0))
    for lo in range(0, 64, 10):
        tally.add(weight[lo : lo + 10], rounded[lo : lo + 10])
    signal, noise = ((x @ w.T.astype(np.float64)) ** 2 for w in (weight, weight - rounded))
    assert tally.sqnr == pytest.approx(10 * math.log10(signal.sum() / noise.sum()), abs=0.05)


@pytest.mark.slow
def test_differences_hold_on_the_demo_model_and_heights_do_not(calibration: Path, tmp_path: Path) -> None:
    schemes = {
        "e4m3 channel": {"scheme": "FP8_DYNAMIC"},
        "e4m3 tensor": {"scheme": "FP8_SCALED"},
        "e5m2 channel": {"format": "e5m2", "granularity": "channel", "quant_method": "fp8pack"},
    }
    predicted = {linear.tensor: linear.sqnr for linear in fp8pack.predict_outputs(DEMO, calibration).linears}
    measured: dict[str, dict[str, float]] = {}
    for name, how in schemes.items():
        fp8pack.pack(DEMO, tmp_path / name, **how)  # type: ignore[arg-type]
        found = fp8pack.evaluate_layers(tmp_path / name, DEMO, num_tokens=1000)
        measured[name] = {f"{linear.name}.weight": linear.sqnr or math.nan for linear in found.linears}
    assert measured["e4m3 channel"].keys() == predicted.keys()
    for other in ("e4m3 tensor", "e5m2 channel"):
        errors = []
        for tensor, sqnr in predicted.items():
            ours, base = sqnr[other], sqnr["e4m3 channel"]
            assert ours is not None
            assert base is not None
            errors.append(measured[other][tensor] - measured["e4m3 channel"][tensor] - (ours - base))
        assert np.mean(np.abs(errors) < 1) >= 0.95, other
    heights = [measured["e4m3 channel"][tensor] - (sqnr["e4m3 channel"] or 0) for tensor, sqnr in predicted.items()]
    assert min(heights) > 1  # as docs/numerics.md says: never too high here


def test_a_checkpoint_gets_predictions_and_a_gate(calibration: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    fp8pack.pack(DEMO, out, scheme="FP8", calibration=calibration)
    found = fp8pack.inspect(out, DEMO, calibration=calibration)
    outputs = [tensor.output_sqnr for tensor in found.tensors if tensor.format]
    assert None not in outputs
    assert all(20 < (sqnr or 0) < 32 for sqnr in outputs)
    words = ["inspect", str(out), "--against", str(DEMO), "--calibration", str(calibration), "-q"]
    ran = CliRunner().invoke(app, [*words, "--fail-if", "output_sqnr_min<99"])
    assert isinstance(ran.exception, fp8pack.BoundError)
    assert "outputs  SQNR predicted: worst" in ran.stdout
    with pytest.raises(fp8pack.RecipeError, match="output_sqnr_min was not measured"):
        fp8pack.inspect(out, DEMO, fail_if="output_sqnr_min<9")
    with pytest.raises(fp8pack.RecipeError, match="source of the weights is needed"):
        fp8pack.inspect(out, calibration=calibration)


def test_the_command_shows_every_granularity(calibration: Path) -> None:
    ran = CliRunner().invoke(app, ["inspect", str(DEMO), "--calibration", str(calibration), "-q"])
    assert ran.exit_code == 0, ran.exception
    assert "e5m2 channel" in ran.stdout
    assert ran.stdout.count("_proj ") == 28


def test_a_calibration_of_another_model_is_refused(calibration: Path, tmp_path: Path) -> None:
    from calibration.tiny_models import make_model, save_model

    torch.manual_seed(0)
    other = save_model(make_model("qwen3"), tmp_path / "other")
    with pytest.raises(fp8pack.InputError, match="is of another model"):
        fp8pack.predict_outputs(other, calibration)
