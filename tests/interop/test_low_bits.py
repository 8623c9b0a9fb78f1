"""Checkpoints of FP4 and integers that other tools wrote: our values are theirs, bit for bit."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import read_tensors
from interop.test_fixtures import FIXTURES, LOW_BITS, digest, expected_of

import fp8pack
from fp8pack.checkpoint.source import open_checkpoint
from fp8pack.errors import InputError
from fp8pack.modelrun.loader import ModelLoader


@pytest.mark.parametrize("name", LOW_BITS)
def test_unpacked_weights_have_the_values_that_the_tool_computes(name: str, tmp_path: Path) -> None:
    expected = expected_of(name)
    dtypes = {entry["dtype"] for entry in expected.values()}
    (dtype,) = dtypes
    fp8pack.unpack(FIXTURES[name], tmp_path / "out", dtype=dtype)
    found = read_tensors(tmp_path / "out")
    for weight, entry in expected.items():
        values = torch.from_numpy(found[weight].astype(np.float32))
        assert list(values.shape) == entry["shape"]
        if name.startswith("modelopt"):
            values += 0.0  # its table has no -0
        assert digest(values) == entry["sha256"], weight
    assert not any("scale" in tensor or "zero_point" in tensor or "shape" in tensor for tensor in found)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()


@pytest.mark.parametrize("name", LOW_BITS)
def test_inspect_shows_them(name: str) -> None:
    facts = fp8pack.inspect(FIXTURES[name])
    assert facts.totals.num_packed == len(expected_of(name))
    found = {(t.format, t.granularity) for t in facts.tensors if t.format}
    assert found == LOW_BITS[name]


@pytest.mark.parametrize("name", ["transformers-gpt_oss", "llmcompressor-w4a16_asym", "llmcompressor-nvfp4"])
def test_the_model_that_a_calibration_runs_has_their_values(name: str) -> None:
    loader = ModelLoader(open_checkpoint(FIXTURES[name]), trust_remote_code=False, device=torch.device("cpu"))
    loader.load_all()
    expected, parameters = expected_of(name), loader.model.state_dict()
    assert expected.keys() <= parameters.keys()
    for weight, entry in expected.items():
        assert digest(parameters[weight]) == entry["sha256"], weight


@pytest.mark.parametrize("verb", [fp8pack.convert, fp8pack.pack])
@pytest.mark.parametrize("name", LOW_BITS)
def test_they_become_fp8_that_loads(name: str, verb: Callable[..., object], tmp_path: Path) -> None:
    """All that differs is the rounding to FP8: 31 dB of E4M3."""
    if verb is fp8pack.pack and name == "modelopt-nvfp4_mixed":
        with pytest.raises(InputError, match="already"):
            verb(FIXTURES[name], tmp_path / "out")
        return
    verb(FIXTURES[name], tmp_path / "out", scheme="FP8_DYNAMIC")
    fp8pack.unpack(FIXTURES[name], tmp_path / "bf16")
    assert len(fp8pack.load_packed(tmp_path / "out", verify=True)) > 0
    facts = fp8pack.inspect(tmp_path / "out", tmp_path / "bf16")
    assert facts.totals.num_packed >= len(expected_of(name))
    assert facts.totals.sqnr_min
    assert facts.totals.sqnr_min > 30
