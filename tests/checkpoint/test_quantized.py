"""Reading FP8 checkpoints of every convention: names, shapes, dtypes, and the values they mean."""

import json
import pickle
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from checkpoint.quantized_cases import (
    BLOCKS,
    CASES,
    CHANNELS,
    CT_BLOCK,
    EXPERTS,
    MODELOPT,
    MODULE,
    TOKEN,
    WEIGHT,
    build,
    fused,
    groups,
    linear,
    packed,
    read,
)
from checkpoints import Tensors, llama_config, random_weight, read_tensors, write_model

import fp8pack
from fp8pack.errors import InputError


@pytest.mark.parametrize("name", CASES)
def test_a_convention_is_understood_from_its_headers(name: str, tmp_path: Path) -> None:
    case, folder = build(name, tmp_path / "model")
    contents = read(folder)
    assert contents.method == case.method
    assert contents.activations == case.activations
    assert contents.unread == ()
    assert set(contents.quantized) == set(case.values)
    for quantized in contents.quantized.values():
        assert quantized.format.name == case.format
        if "experts" not in name and case.granularity:
            assert quantized.granularity.name == case.granularity
    plain = {n for n, t in case.tensors.items() if not n.endswith(("fp8", "quant")) and "scale" not in n}
    plain = {n.replace("_weight_qdata", "weight") for n in plain}
    assert {spec.name for spec in contents.tensors} == plain


@pytest.mark.parametrize("name", CASES)
def test_a_convention_means_the_values_that_its_tool_means(name: str, tmp_path: Path) -> None:
    case, folder = build(name, tmp_path / "model")
    loaded = fp8pack.load_packed(folder)
    fp8pack.unpack(folder, tmp_path / "out", dtype="float32")
    unpacked = read_tensors(tmp_path / "out")
    for weight, values in case.values.items():
        tensor = loaded[weight]
        assert isinstance(tensor, fp8pack.PackedTensor)
        found = tensor.dequantize(torch.float32).numpy()
        np.testing.assert_array_equal(unpacked[weight], values, err_msg=f"unpack {weight}")
        np.testing.assert_array_equal(found, values, err_msg=f"load_packed {weight}")


@pytest.mark.parametrize("name", CASES)
def test_a_convention_can_be_inspected(name: str, tmp_path: Path) -> None:
    case, folder = build(name, tmp_path / "model")
    facts = fp8pack.inspect(folder)
    assert facts.totals.num_packed == len(case.values)
    assert facts.quant_method == case.method


def test_a_static_scale_of_what_enters_is_found_under_each_name(tmp_path: Path) -> None:
    names = ("transformers, tensor", "AutoFP8, static", "ModelOpt FP8", "Quark, tensor", "Mistral", "ComfyUI, older")
    for name in names:
        _, folder = build(name, tmp_path / name)
        (quantized,) = read(folder).quantized.values()
        assert quantized.input_scale is not None, name


def test_a_fused_expert_tensor_of_16384_rows_has_blocks_and_no_scale_for_each_column(tmp_path: Path) -> None:
    """The grid [E, 128, K / 128] has as many numbers as [E, K]: only the shape tells them apart."""
    shape, grid = (2, 16384, 256), (2, 128, 2)
    begin = 2 * 16384 * 256
    entries = {
        f"{EXPERTS}.gate_up_proj": {"dtype": "F8_E4M3", "shape": shape, "data_offsets": [0, begin]},
        f"{EXPERTS}.gate_up_proj_scale_inv": {
            "dtype": "F32", "shape": grid, "data_offsets": [begin, begin + 4 * 2 * 128 * 2],
        },
    }  # fmt: skip
    raw = json.dumps(entries).encode()
    folder = write_model(tmp_path / "model", {"x": np.zeros(1, np.uint8)}, {"quantization_config": BLOCKS})
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + begin + 4 * 2 * 128 * 2)
    (quantized,) = read(folder).quantized.values()
    assert quantized.granularity.name == "block:128x128"


def test_fused_mx_experts_of_32_rows_are_mx(tmp_path: Path) -> None:
    parts = fused([packed("mx", (32, 64), scale=np.uint8, seed=i) for i in range(2)])
    tensors: Tensors = {f"{EXPERTS}.down_proj": parts[0], f"{EXPERTS}.down_proj_scale_inv": parts[1]}
    config = {"hidden_size": 32, "quantization_config": {"quant_method": "mxfp8", "weight_block_size": [1, 32]}}
    folder = write_model(tmp_path / "model", tensors, config)
    (quantized,) = read(folder).quantized.values()
    assert quantized.granularity.name == "mx"
    fp8pack.unpack(folder, tmp_path / "out", dtype="float32")
    np.testing.assert_array_equal(read_tensors(tmp_path / "out")[f"{EXPERTS}.down_proj"], parts[2])


@pytest.mark.parametrize("shape", [(128, 96), (96, 96)], ids=str)
def test_modelopts_channel_scales_of_fused_experts_have_two_dimensions(shape: tuple[int, int], tmp_path: Path) -> None:
    """[E, N] beside [E, N, K], as [N] stands beside [N, K]; where N = K, the model's type says what comes last."""
    parts = fused([packed("channel", shape, seed=i) for i in range(3)])
    name = f"{EXPERTS}.gate_up_proj"
    tensors: Tensors = {name: parts[0], f"{name}_weight_scale": parts[1].reshape(3, -1)}
    quantization = MODELOPT | {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}
    config = llama_config() | {"hidden_size": shape[1], "quantization_config": quantization}
    folder = write_model(tmp_path / "model", tensors, config)
    fp8pack.unpack(folder, tmp_path / "out", dtype="float32")
    np.testing.assert_array_equal(read_tensors(tmp_path / "out")[name], parts[2])


# Mixed layers.


def test_layers_of_different_granularities_and_floats_stand_side_by_side(tmp_path: Path) -> None:
    """As mixed-precision compressed-tensors: a block group, a channel group, a tensor group, and what is ignored."""
    config = groups(CHANNELS, TOKEN)
    config["config_groups"]["group_1"] = CT_BLOCK["config_groups"]["group_0"] | {"targets": ["re:.*down_proj"]}
    tensors: Tensors = {"model.layers.0.mlp.gate_proj.weight": random_weight((64, 64))}
    expected = {}
    kinds = {"up_proj": "channel", "down_proj": "block:128x128", "o_proj": "tensor"}
    for i, (leaf, granularity) in enumerate(kinds.items()):
        payload, scales, values = packed(granularity, (256, 256), seed=i)
        tensors |= {f"model.layers.0.mlp.{leaf}.weight": payload, f"model.layers.0.mlp.{leaf}.weight_scale": scales}
        expected[f"model.layers.0.mlp.{leaf}.weight"] = (granularity, values)
    folder = write_model(tmp_path / "model", tensors, llama_config() | {"quantization_config": config})
    contents = read(folder)
    assert {n: q.granularity.name for n, q in contents.quantized.items()} == {n: g for n, (g, _) in expected.items()}
    loaded = fp8pack.load_packed(folder)
    for name, (_, values) in expected.items():
        np.testing.assert_array_equal(loaded[name].dequantize(torch.float32).numpy(), values)


def test_channel_scales_with_k_of_128_are_no_groups_though_activations_have_groups_of_128(tmp_path: Path) -> None:
    """[N, 1] may be either; the group of 128 that is announced is that of activations."""
    config = groups(CHANNELS, TOKEN)
    config["config_groups"]["group_1"] = CT_BLOCK["config_groups"]["group_0"] | {"targets": ["re:.*down_proj"]}
    payload, scales, values = packed("channel", (64, 128))
    tensors: Tensors = {WEIGHT: payload, f"{MODULE}.weight_scale": scales}
    folder = write_model(tmp_path / "model", tensors, llama_config() | {"quantization_config": config})
    (quantized,) = read(folder).quantized.values()
    assert quantized.granularity.name == "channel"
    assert np.array_equal(fp8pack.load_packed(folder)[WEIGHT].dequantize(torch.float32).numpy(), values)


def test_multi_token_prediction_layers_are_read_as_any_other(tmp_path: Path) -> None:
    payload, scales, _ = packed("block:128x128", (128, 128))
    names = ("model.layers.0.mlp.down_proj", "model.layers.61.eh_proj", "model.layers.61.mlp.down_proj")
    tensors: Tensors = {f"{name}.weight": payload for name in names}
    tensors |= {f"{name}.weight_scale_inv": scales for name in names}
    config = llama_config(layers=61) | {"quantization_config": BLOCKS}
    contents = read(write_model(tmp_path / "model", tensors, config))
    assert set(contents.quantized) == {f"{name}.weight" for name in names}


def test_weights_and_scales_may_lie_in_different_shards(tmp_path: Path) -> None:
    case = CASES["fp8, F32"]()
    folder = write_model(tmp_path / "model", case.tensors, case.config, shards=2)
    (quantized,) = read(folder).quantized.values()
    assert quantized.scale is not None
    assert quantized.scale.file == "model-00002-of-00002.safetensors"
    assert np.array_equal(fp8pack.load_packed(folder)[WEIGHT].dequantize(torch.float32).numpy(), case.values[WEIGHT])


# Scales of K and V.

ATTENTION = "model.layers.0.self_attn"
KV_SPELLINGS = {
    "compressed-tensors, AutoFP8": (f"{ATTENTION}.k_scale", f"{ATTENTION}.v_scale"),
    "ModelOpt": (f"{ATTENTION}.k_proj.k_scale", f"{ATTENTION}.v_proj.v_scale"),
    "Quark": (f"{ATTENTION}.k_proj.output_scale", f"{ATTENTION}.v_proj.output_scale"),
    "fused on disk": (f"{ATTENTION}.qkv_proj.k_scale", f"{ATTENTION}.qkv_proj.v_scale"),
    "vLLM's own": (f"{ATTENTION}.attn.k_scale", f"{ATTENTION}.attn.v_scale"),
    "Hunyuan": (f"{ATTENTION}.k_cache.scale", f"{ATTENTION}.v_cache.scale"),
    "Mistral": (f"{ATTENTION}.k_fake_quantizer.qscale_act", f"{ATTENTION}.v_fake_quantizer.qscale_act"),
}


@pytest.mark.parametrize("shape", [(), (1,), (2, 1, 1)], ids=str)
@pytest.mark.parametrize("spelling", KV_SPELLINGS)
def test_scales_of_k_and_v_are_found_under_each_name(spelling: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    scales = {name: np.full(shape, i + 1, np.float32) for i, name in enumerate(KV_SPELLINGS[spelling])}
    case = linear(CT_BLOCK, "block:128x128", extra=scales)
    folder = write_model(tmp_path / "model", case.tensors, case.config)
    contents = read(folder)
    assert set(contents.kv_scales) == {f"{ATTENTION}.k", f"{ATTENTION}.v"}
    assert not any("scale" in spec.name for spec in contents.tensors)
    kv_scales = fp8pack.load_packed(folder).kv_scales
    assert [float(kv_scales[f"{ATTENTION}.{kind}"].flatten()[0]) for kind in "kv"] == [1.0, 2.0]


@pytest.mark.parametrize("attention", ["backbone.layers.3.mixer", "model.language_model.layers.0.self_attn"])
def test_attentions_of_other_names_have_scales_too(attention: str, tmp_path: Path) -> None:
    scales = {f"{attention}.{kind}_proj.{kind}_scale": np.ones((), np.float32) for kind in "kv"}
    case = linear(CT_BLOCK, "block:128x128", extra=scales)
    contents = read(write_model(tmp_path / "model", case.tensors, case.config))
    assert set(contents.kv_scales) == {f"{attention}.k", f"{attention}.v"}


def test_the_oldest_scale_serves_k_and_v(tmp_path: Path) -> None:
    case = linear(CT_BLOCK, "block:128x128", extra={f"{ATTENTION}.kv_scale": np.ones(1, np.float32)})
    contents = read(write_model(tmp_path / "model", case.tensors, case.config))
    assert {point: spec.name for point, spec in contents.kv_scales.items()} == {
        f"{ATTENTION}.{kind}": f"{ATTENTION}.kv_scale" for kind in "kv"
    }


def test_the_scales_of_q_and_of_probabilities_do_not_stay_behind_as_weights(tmp_path: Path) -> None:
    scales = {
        f"{ATTENTION}.{name}": np.ones((), np.float32)
        for name in ("k_scale", "v_scale", "q_scale", "q_proj.output_scale", "prob_output_scale")
    }
    case = linear(CT_BLOCK, "block:128x128", extra=scales)
    folder = write_model(tmp_path / "model", case.tensors, case.config)
    assert set(read(folder).kv_scales) == {f"{ATTENTION}.k", f"{ATTENTION}.v"}
    fp8pack.unpack(folder, tmp_path / "out")
    assert [name for name in read_tensors(tmp_path / "out") if "scale" in name] == []


# What is no weight and no scale.


class _Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path(_Trap.path),))

    path = ""


def test_transformer_engines_pickled_state_is_a_tensor_as_any_other(tmp_path: Path) -> None:
    _Trap.path = str(tmp_path / "sprung")
    state = np.frombuffer(pickle.dumps({"recipe": _Trap()}), np.uint8)
    extra: Tensors = {f"{MODULE}._extra_state": state, "model.layers.1.mlp._extra_state": np.zeros(0, np.uint8)}
    case = linear(BLOCKS, "block:128x128", "weight_scale_inv", extra=extra)
    folder = write_model(tmp_path / "model", case.tensors, case.config)
    assert read(folder).unread == ()
    fp8pack.load_packed(folder)[f"{MODULE}._extra_state"]
    fp8pack.inspect(folder)
    fp8pack.unpack(folder, tmp_path / "out")
    assert read_tensors(tmp_path / "out")[f"{MODULE}._extra_state"].tobytes() == state.tobytes()
    assert not (tmp_path / "sprung").exists()
    pickle.loads(state.tobytes())
    assert (tmp_path / "sprung").exists(), "the trap is a real one"


@pytest.mark.parametrize("more", [(1, 0), (0, 2), (3, 1)])
def test_a_grid_of_scales_that_was_padded_is_read_by_its_first_blocks(more: tuple[int, int], tmp_path: Path) -> None:
    """As DeepSeek-V3 fine-tuned on many GPUs may have it: ceil(N/128) is rounded up to the number of shards."""
    case = linear(BLOCKS, "block:128x128", "weight_scale_inv", shape=(200, 384))
    name = f"{MODULE}.weight_scale_inv"
    grid = case.tensors[name]
    case.tensors[name] = np.pad(grid, ((0, more[0]), (0, more[1])), constant_values=7)
    folder = write_model(tmp_path / "model", case.tensors, case.config)
    fp8pack.unpack(folder, tmp_path / "out", dtype="float32")
    assert np.array_equal(read_tensors(tmp_path / "out")[WEIGHT], case.values[WEIGHT])


def test_a_grid_of_scales_that_lacks_a_block_is_refused(tmp_path: Path) -> None:
    case = linear(BLOCKS, "block:128x128", "weight_scale_inv", shape=(300, 384))
    name = f"{MODULE}.weight_scale_inv"
    case.tensors[name] = np.ascontiguousarray(case.tensors[name][:-1])
    with pytest.raises(InputError, match="match no known scale region"):
        fp8pack.inspect(write_model(tmp_path / "model", case.tensors, case.config))


def test_a_padded_grid_of_fused_experts_is_refused(tmp_path: Path) -> None:
    """The grids of the experts lie one after the other, so that none may be longer than its blocks."""
    tensors: Tensors = {
        f"{EXPERTS}.down_proj": np.zeros((2, 256, 128), np.uint8).view(ml_dtypes.float8_e4m3fn),
        f"{EXPERTS}.down_proj_scale_inv": np.ones((2, 3, 1), np.float32),
    }
    folder = write_model(tmp_path / "model", tensors, llama_config() | {"quantization_config": BLOCKS})
    with pytest.raises(InputError, match="match no known scale region"):
        fp8pack.inspect(folder)


def test_a_tower_stays_a_tower_where_the_language_model_is_quantized(tmp_path: Path) -> None:
    """A tower is packed where it is all of the model, and quantized weights count as the rest of it."""
    payload, scales, _ = packed("block:128x128", (256, 256))
    tower = "vision_tower.encoder.layers.0.mlp.fc1"
    tensors: Tensors = {WEIGHT: payload, f"{MODULE}.weight_scale_inv": scales}
    tensors |= {f"{tower}.weight": random_weight((256, 256), 3)}
    folder = write_model(tmp_path / "model", tensors, llama_config() | {"quantization_config": BLOCKS})
    found = fp8pack.convert(folder, scheme="FP8_DYNAMIC", dry_run=True).kept
    assert [(each.name, each.role) for each in found] == [(f"{tower}.weight", "tower")]
    fp8pack.convert(folder, tmp_path / "out", scheme="FP8_DYNAMIC")
    listed = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert {tower, f"model.{tower}"} <= {*listed}
