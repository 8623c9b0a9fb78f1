"""The Transformer Engine example: names, histories and scales, held against a calibration of the demo model."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import DEMO
from torch import Tensor, nn

import fp8pack
from fp8pack.checkpoint.calibration_file import read_calibration
from fp8pack.planning.calibration import Calibration, Site, value_of

sys.path.insert(0, str(DEMO.parent / "transformer_engine"))
import prewarm

LAYER = "model.layers.1"
Q, OUT, DOWN, UP = (f"{LAYER}.{leaf}_proj" for leaf in ("self_attn.q", "self_attn.o", "mlp.down", "mlp.up"))
PROMPTS = 5


@dataclass
class State:
    """The state that Transformer Engine keeps for the forward pass of a module with one GEMM."""

    scale: Tensor
    amax_history: Tensor


@dataclass
class StateOfOldVersions(State):
    scale_inv: Tensor


def new_state(length: int) -> State:
    return State(torch.ones(3), torch.zeros(length, 3))


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    output = tmp_path_factory.mktemp("prewarm") / "calibration.safetensors"
    fp8pack.calibrate(DEMO, output, num_prompts=PROMPTS, device="cpu")
    return read_calibration(output)


def prompt_amax(calibration: Calibration, module: str) -> list[float]:
    return [value_of(magnitude) for magnitude in calibration.by_point[f"{module}.input"].prompt_amax]


def with_sites(calibration: Calibration, amax: dict[str, list[float]]) -> Calibration:
    """A calibration of these modules alone, each with the amax of its prompts."""
    any_site = calibration.sites[0]
    sites: list[Site] = []
    for module, values in amax.items():
        magnitudes = (torch.tensor(values).bfloat16().view(torch.int16).numpy()).astype(np.uint16)
        sites.append(replace(any_site, points=(f"{module}.input",), prompt_amax=magnitudes))
    return Calibration("", calibration.prompts, {}, tuple(sites))


def test_every_linear_of_the_demo_has_a_seed_under_its_own_name(calibration: Calibration) -> None:
    leaves = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
    paths = [f"model.layers.{layer}.{leaf}_proj" for layer in (0, 1) for leaf in leaves]
    found = prewarm.seeds(calibration, dict.fromkeys(paths, 0.5), history_length=16)
    assert list(found.by_module) == paths
    assert not found.missing
    assert all(seed.parts == (path,) for path, seed in found.by_module.items())
    assert not any(name in paths for name in found.unused)


@pytest.mark.parametrize("length", [1, 2, 3, PROMPTS, PROMPTS + 1, PROMPTS + 4])
def test_a_history_ends_with_the_newest_prompt_and_leaves_row_0_to_the_next_pass(
    calibration: Calibration, length: int
) -> None:
    (seed,) = prewarm.seeds(calibration, {DOWN: 0.5}, history_length=length).by_module.values()
    known = prompt_amax(calibration, DOWN)
    kept = known[-max(1, length - 1) :]
    assert len(known) == PROMPTS
    assert seed.amax_history[:, prewarm.INPUT].tolist() == [0.0] * (length - len(kept)) + kept
    assert seed.amax_history[:, prewarm.WEIGHT].tolist() == [0.0] * (length - len(kept)) + [0.5] * len(kept)
    assert seed.scale[prewarm.INPUT] == torch.tensor(448.0) / max(known)  # of all prompts, however short the history


@pytest.mark.parametrize("margin", [0, 1, 3])
def test_a_scale_is_the_inverse_of_ours(calibration: Calibration, margin: int) -> None:
    (seed,) = prewarm.seeds(calibration, {DOWN: 0.75}, history_length=4, margin=margin).by_module.values()
    amax = torch.tensor([calibration.by_point[f"{DOWN}.input"].amax, 0.75])
    assert seed.scale.tolist() == (torch.tensor(448.0) / amax / 2**margin).tolist()
    assert seed.scale * 2**margin == pytest.approx((1 / (amax / 448)).numpy(), rel=1e-6)


def test_an_amax_without_a_scale_gets_one() -> None:
    amax = torch.tensor([0.0, torch.inf, torch.nan, 1e-40, 448.0, -0.0])
    largest = torch.finfo(torch.float32).max
    assert prewarm.scale_of(amax).tolist() == [1.0, 1.0, 1.0, largest, 1.0, 1.0]
    assert prewarm.scale_of(amax, margin=2)[[0, 4]].tolist() == [1.0, 0.25]


def test_what_engines_fuse_has_the_largest_amax_of_its_parts(calibration: Calibration) -> None:
    attention = "model.layers.0.self_attn"
    amax = {f"{attention}.q_proj": [1.0, 7.0], f"{attention}.k_proj": [4.0, 2.0], f"{attention}.v_proj": [3.0, 3.0]}
    found = prewarm.seeds(with_sites(calibration, amax), {f"{attention}.qkv_proj": 2.0}, history_length=3)
    seed = found.by_module[f"{attention}.qkv_proj"]
    assert seed.parts == tuple(amax)
    assert seed.amax_history[:, prewarm.INPUT].tolist() == [0.0, 4.0, 7.0]
    assert seed.scale.tolist() == [448 / 7, 224.0]
    assert not found.unused


def test_the_fused_linears_of_the_demo(calibration: Calibration) -> None:
    paths = (f"{LAYER}.self_attn.qkv_proj", f"{LAYER}.mlp.gate_up_proj")
    found = prewarm.seeds(calibration, dict.fromkeys(paths, 1.0), history_length=8)
    assert [len(found.by_module[path].parts) for path in paths] == [3, 2]
    assert found.by_module[paths[0]].scale[0] == torch.tensor(448.0) / max(prompt_amax(calibration, Q))


def test_other_paths_are_named(calibration: Calibration) -> None:
    path = "decoder.1.self_attention.layernorm_qkv"
    names = {path: [f"{LAYER}.self_attn.{leaf}_proj" for leaf in "qkv"]}
    found = prewarm.seeds(calibration, {path: 1.0}, history_length=8, names=names)
    assert found.by_module[path].parts == tuple(names[path])


def test_what_was_not_calibrated_is_reported_by_name(calibration: Calibration) -> None:
    names = {"half": [Q, "model.layers.9.self_attn.k_proj"]}
    found = prewarm.seeds(calibration, {OUT: 1.0, "head": 1.0, "half": 1.0}, history_length=8, names=names)
    assert list(found.by_module) == [OUT]
    assert found.missing == ("head", "half")
    assert Q in found.unused
    assert OUT not in found.unused


def test_a_seed_is_written_in_place_beside_what_belongs_to_the_output(calibration: Calibration) -> None:
    (seed,) = prewarm.seeds(calibration, {UP: 0.5}, history_length=4).by_module.values()
    state = new_state(4)
    state.amax_history[:, 2], state.scale[2] = 9.0, 3.0
    views = state.scale[0], state.amax_history[3]  # as quantizers hold them
    prewarm.write(seed, state)
    assert state.amax_history[:, :2].equal(seed.amax_history)
    assert state.amax_history[:, 2].tolist() == [9.0] * 4
    assert state.scale.tolist() == [*seed.scale.tolist(), 3.0]
    assert views[0] == seed.scale[0]
    assert views[1][0] == prompt_amax(calibration, UP)[-1]


def test_the_inverse_of_old_versions_is_written_too(calibration: Calibration) -> None:
    (seed,) = prewarm.seeds(calibration, {UP: 0.5}, history_length=4).by_module.values()
    state = StateOfOldVersions(torch.ones(3), torch.zeros(4, 3), torch.ones(3))
    prewarm.write(seed, state)
    assert state.scale_inv.tolist() == [*(1 / seed.scale).tolist(), 1.0]


def test_the_update_of_delayed_scaling_keeps_what_was_seeded(calibration: Calibration) -> None:
    """One update as Transformer Engine makes it: the largest amax, the history turned by a row, row 0 set to zero."""
    (seed,) = prewarm.seeds(calibration, {DOWN: 0.5}, history_length=PROMPTS + 2).by_module.values()
    state = new_state(PROMPTS + 2)
    prewarm.write(seed, state)
    state.amax_history[0, :2] = 0.25  # what the pass recorded
    scale = prewarm.scale_of(state.amax_history.amax(0))
    turned = state.amax_history.roll(-1, 0)
    assert scale[:2].equal(seed.scale)
    assert turned[-1, :2].tolist() == [0.25, 0.25]
    assert turned[-2, 0] == prompt_amax(calibration, DOWN)[-1]
    assert prewarm.keep_scale(state.amax_history.amax(0), state.scale, torch.tensor(448.0), None) is state.scale


def test_histories_of_another_length_are_refused(calibration: Calibration) -> None:
    (seed,) = prewarm.seeds(calibration, {UP: 0.5}, history_length=4).by_module.values()
    with pytest.raises(ValueError, match="has 5 rows, the seed 4"):
        prewarm.write(seed, new_state(5))
    with pytest.raises(ValueError, match="at least one row"):
        prewarm.seeds(calibration, {}, history_length=0)


def test_the_amax_of_weights() -> None:
    linear = nn.Linear(4, 3)
    with torch.no_grad():
        linear.weight.zero_()[1, 2] = -2.5
        linear.bias.fill_(7.0)
    assert prewarm.weight_amax_of(linear) == 2.5
    with torch.no_grad():
        linear.weight[0, 0] = torch.nan
    assert np.isnan(prewarm.weight_amax_of(linear))


def test_the_example_needs_no_transformer_engine_to_be_imported() -> None:
    assert "transformer_engine" not in sys.modules
    assert Path(prewarm.__file__).parent.name == "transformer_engine"
