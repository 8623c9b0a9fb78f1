"""FP8 checkpoints that lack something, contradict themselves, or are of another format."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import verbs
from checkpoint.quantized_cases import (
    CASES,
    EXPERTS,
    MODULE,
    WEIGHT,
    build,
    linear,
    packed,
    read,
)
from checkpoints import Tensors, llama_config, random_weight, read_tensors, write_model, write_shard

import fp8pack
from fp8pack.errors import InputError
from fp8pack.packing.options import WriteOptions
from fp8pack.planning.recipe import Request


def refusal(folder: Path, *, what: Callable[[Path], object] = read) -> str:
    with pytest.raises(InputError) as caught:
        what(folder)
    message = caught.value.command_line
    assert len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize(
    "name", ["fp8, F32", "compressed-tensors, channel", "ModelOpt FP8", "torchao, row", "Mistral", "ComfyUI"]
)
def test_an_fp8_weight_without_its_scale_is_refused(name: str, tmp_path: Path) -> None:
    case, folder = build(name, tmp_path / "model")
    (weight,) = case.values
    scales = [n for n in case.tensors if "scale" in n and "act" not in n and "input" not in n]
    write_shard(
        folder / "model.safetensors",
        {n: t for n, t in case.tensors.items() if n not in scales},
        case.metadata,
    )
    message = refusal(folder)
    assert weight.removesuffix("weight") in message
    assert "no scale" in message


@pytest.mark.parametrize("name", ["fp8, F32", "compressed-tensors, channel", "ModelOpt FP8", "torchao, row", "Mistral"])
def test_a_scale_without_its_fp8_weight_is_refused(name: str, tmp_path: Path) -> None:
    """Also where a float weight stands in its place: one of the two is not what it was."""
    case, folder = build(name, tmp_path / "model")
    (weight,) = case.values
    payload = next(n for n, t in case.tensors.items() if t.dtype == ml_dtypes.float8_e4m3fn)
    module = weight.removesuffix(".weight")
    whole = {n.replace(module, "layers.9.mlp.w1"): t for n, t in case.tensors.items() if n.startswith(module)}
    for replacement in ({}, {weight: random_weight((64, 64))}):
        tensors = {n: t for n, t in case.tensors.items() if n != payload} | replacement | whole
        write_shard(folder / "model.safetensors", tensors, case.metadata)
        assert "without a quantized weight" in refusal(folder)


def test_a_fused_scale_without_its_fp8_weight_is_refused(tmp_path: Path) -> None:
    case, folder = build("fused experts, block", tmp_path / "model")
    tensors = {n: t for n, t in case.tensors.items() if n != f"{EXPERTS}.down_proj"}
    write_shard(folder / "model.safetensors", tensors)
    assert "without a quantized weight" in refusal(folder)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("fp8, F32", (3,)),
        ("fp8, F32", (3, 2)),
        ("fp8, F32", (2, 3, 1)),
        ("fp8, F32", (0,)),
        ("compressed-tensors, channel", (63, 1)),
        ("compressed-tensors, channel", (1, 1, 64)),
        ("compressed-tensors, mx", (48, 5)),
        ("ModelOpt block", (2, 3, 1, 1)),
        ("ModelOpt channel", (2,)),
        ("fused experts, block", (3, 3, 2)),
        ("fused experts, block", (2, 2, 3)),
        ("fused experts, block", (5,)),
    ],
    ids=str,
)
def test_a_scale_of_a_shape_that_fits_nothing_is_refused(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    case, folder = build(name, tmp_path / "model")
    scale = next(n for n in case.tensors if "scale" in n)
    wrong = np.ones(shape, case.tensors[scale].dtype)
    write_shard(folder / "model.safetensors", case.tensors | {scale: wrong})
    message = refusal(folder)
    assert "match no known scale region" in message
    assert str(list(shape)) in message


@pytest.mark.parametrize("value", [-1.0, np.nan, np.inf])
@pytest.mark.parametrize("what", ["unpack", "convert"])
def test_a_scale_that_is_no_scale_is_refused_when_written(what: str, value: float, tmp_path: Path) -> None:
    case, folder = build("fp8, F32", tmp_path / "model")
    scale = case.tensors[f"{MODULE}.weight_scale_inv"].copy()
    scale[1, 2] = value
    write_shard(folder / "model.safetensors", case.tensors | {f"{MODULE}.weight_scale_inv": scale})
    options = WriteOptions(output=tmp_path / "out")
    asked = Request(quant_method="fp8pack", scheme="FP8_BLOCK")
    run = {
        "unpack": lambda path: verbs.unpack(path, options=options),
        "convert": lambda path: verbs.convert(path, asked, options),
    }[what]
    assert "weight_scale_inv" in refusal(folder, what=run)
    assert not (tmp_path / "out").exists()


def test_an_exponent_of_255_is_no_scale(tmp_path: Path) -> None:
    case, folder = build("mxfp8", tmp_path / "model")
    scale = case.tensors[f"{MODULE}.weight_scale_inv"].copy()
    scale[3, 3] = 255
    write_shard(folder / "model.safetensors", case.tensors | {f"{MODULE}.weight_scale_inv": scale})
    refusal(folder, what=lambda path: fp8pack.unpack(path, tmp_path / "out"))


OTHERS: dict[str, tuple[dict[str, Any], Tensors]] = {
    "bytes without scales": ({"quant_method": "other"}, {WEIGHT: np.zeros((64, 32), np.uint8)}),
    "integers without scales": ({"quant_method": "other"}, {WEIGHT: np.zeros((64, 64), np.int8)}),
    "FP8 of AMD's older GPUs": (
        {"quant_method": "fp8", "activation_scheme": "dynamic"},
        {WEIGHT: np.zeros((64, 64), ml_dtypes.float8_e4m3fnuz), f"{MODULE}.weight_scale": np.ones((), np.float32)},
    ),
    "GPTQ": (
        {"quant_method": "gptq", "bits": 4},
        {f"{MODULE}.qweight": np.zeros((8, 64), np.int32), f"{MODULE}.scales": np.ones((1, 64), np.float16)},
    ),
}


@pytest.mark.parametrize("with_fp8", [False, True], ids=["alone", "beside FP8"])
@pytest.mark.parametrize("name", OTHERS)
def test_weights_of_other_formats_are_recognised_and_refused(name: str, with_fp8: bool, tmp_path: Path) -> None:
    config, tensors = OTHERS[name]
    payload, scales, _ = packed("tensor")
    module = "model.layers.0.self_attn.o_proj"
    beside: Tensors = {f"{module}.weight": payload, f"{module}.weight_scale": scales} if with_fp8 else {}
    beside |= {"lm_head.weight": random_weight((32, 64))}
    folder = write_model(tmp_path / "model", tensors | beside, llama_config() | {"quantization_config": config})
    assert len(read(folder).unread) == 1
    fp8pack.inspect(folder)
    options = WriteOptions(output=tmp_path / "out")
    for run in (
        lambda path: verbs.unpack(path, options=options),
        lambda path: verbs.convert(path, Request(scheme="FP8_DYNAMIC"), options),
    ):
        message = refusal(folder, what=run)
        assert "in a format that is not read" in message
        assert read(folder).unread[0] in message
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_tiles_that_are_not_padded_are_refused_and_never_read_beyond_their_end(tmp_path: Path) -> None:
    """ComfyUI's and torchao's tiles are whole: a tensor with fewer bytes than its tiles holds something else."""
    case, folder = build("ComfyUI, mx", tmp_path / "model")
    scale = next(name for name in case.tensors if "scale" in name)
    wrong = np.full((160, 3), 127, np.uint8)
    write_shard(folder / "model.safetensors", {scale: wrong} | {n: t for n, t in case.tensors.items() if n != scale})
    options = WriteOptions(output=tmp_path / "out")
    assert "match no known scale region" in refusal(folder, what=lambda path: verbs.unpack(path, options=options))


def test_of_files_without_a_word_one_weight_that_lost_its_scale_is_not_taken_for_unscaled(tmp_path: Path) -> None:
    """Its values would be a thousand times too large, and nothing would say so."""
    case, folder = build("scaled without a word", tmp_path / "model")
    other = "model.layers.1.mlp.up_proj.weight"
    write_shard(folder / "model.safetensors", case.tensors | {other: packed("tensor")[0]})
    message = refusal(folder)
    assert other in message


def test_two_tensors_that_claim_one_name_are_refused(tmp_path: Path) -> None:
    """torchao's `_weight_qdata` is `weight`; a file that holds both would be written with one of them twice."""
    case = CASES["torchao, row"]()
    tensors = case.tensors | {WEIGHT: random_weight((64, 64))}
    folder = write_model(tmp_path / "model", tensors, case.config, metadata=case.metadata)
    message = refusal(folder, what=lambda path: fp8pack.unpack(path, tmp_path / "out"))
    assert WEIGHT in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("grid", [(), (1,), (0, 1)], ids=str)
def test_an_fp8_weight_without_elements_is_no_error_anywhere(grid: tuple[int, ...], tmp_path: Path) -> None:
    case = CASES["compressed-tensors, channel"]()
    name = "model.layers.1.mlp.up_proj.weight"
    empty: Tensors = {name: np.zeros((0, 64), ml_dtypes.float8_e4m3fn), f"{name}_scale": np.ones(grid, np.float32)}
    folder = write_model(tmp_path / "model", case.tensors | empty, case.config)
    assert fp8pack.load_packed(folder)[name].dequantize(torch.float32).shape == (0, 64)
    fp8pack.unpack(folder, tmp_path / "out")
    assert read_tensors(tmp_path / "out")[name].shape == (0, 64)
    fp8pack.convert(folder, tmp_path / "converted", quant_method="modelopt")
    assert fp8pack.inspect(folder).totals.num_packed == 2
    assert fp8pack.diff(folder, folder).totals.num_equal == 4


def test_fp8_bytes_of_amds_older_gpus_are_never_passed_on_as_they_are(tmp_path: Path) -> None:
    """They mean half of what the same bytes mean elsewhere, and nothing would say so."""
    case = CASES["unscaled"]()
    odd: Tensors = {"blocks.1.ffn.0.weight": np.ones((64, 64), ml_dtypes.float8_e4m3fnuz)}
    folder = write_model(tmp_path / "model", case.tensors | odd)
    message = refusal(folder, what=lambda path: fp8pack.unpack(path, tmp_path / "out"))
    assert "blocks.1.ffn.0.weight" in message


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "x", "granularity": "PerRow()"},
        {"quant_method": "fp8pack", "granularity": 7},
        {"quant_method": "fp8pack"},
        {"quant_method": None, "group_size": True},
        {"quant_method": ["fp8"], "weight_block_size": [0, -1]},
        {"quant_method": "fp8", "weight_block_size": [10**40, 10**40], "config_groups": [1]},
        {"quant_method": "fp8", "weight_block_size": "128x128", "config_groups": {"g": None}},
        {"quant_method": "compressed-tensors", "config_groups": {"FP8_DYNAMIC": ["Linear"]}},
    ],
    ids=json.dumps,
)
def test_strange_configurations_are_read_by_shape_or_refused_in_one_line(
    quantization: dict[str, Any], tmp_path: Path
) -> None:
    case = linear(quantization, "channel", method="")
    folder = write_model(tmp_path / "model", case.tensors, case.config)
    try:
        (quantized,) = read(folder).quantized.values()
    except InputError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert quantized.granularity.name == "channel"
