"""FP4 and integers of every convention: their values are those of the tools that write them, bit for bit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import verbs
from checkpoint.low_bits_cases import CASES, EXPERTS, MODULE, LowBits, codes
from checkpoint.quantized_cases import BLOCKS, E8M0
from checkpoints import Tensors, read_tensors

import fp8pack
from fp8pack.checkpoint.quantized import read_contents
from fp8pack.checkpoint.source import open_checkpoint
from fp8pack.errors import InputError
from fp8pack.packing.options import WriteOptions
from fp8pack.planning.sizes import Sizes


def check(found: Tensors, expected: LowBits) -> None:
    """Every weight has its values, everything else is as it was, and there is nothing more."""
    assert found.keys() == expected.values.keys() | expected.rest.keys()
    for name, tensor in (expected.values | expected.rest).items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        np.testing.assert_array_equal(found[name].view(np.uint16), tensor.view(np.uint16), err_msg=name)


@pytest.mark.parametrize("name", CASES)
def test_the_values_are_those_of_the_tool(name: str, tmp_path: Path) -> None:
    expected = CASES[name]()
    source = expected.write(tmp_path / "model", shards=3)
    facts = fp8pack.unpack(source, tmp_path / "out")
    assert facts.num_unpacked == len(expected.values)
    check(read_tensors(tmp_path / "out"), expected)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_bands_strips_and_columns_change_no_byte(name: str, tmp_path: Path) -> None:
    expected = CASES[name]()
    source = expected.write(tmp_path / "model")
    cuts = {
        "rows": Sizes(band=999, strip=700),
        "columns": Sizes(band=33, granule=40, strip=100),
        "odd": Sizes(band=7, granule=8, strip=1),
    }
    for cut, sizes in cuts.items():
        verbs.unpack(source, options=WriteOptions(tmp_path / cut, workers=2, sizes=sizes))
        check(read_tensors(tmp_path / cut), expected)


@pytest.mark.parametrize("name", CASES)
def test_they_are_understood_from_their_headers_and_shown(name: str, tmp_path: Path) -> None:
    expected = CASES[name]()
    source = expected.write(tmp_path / "model")
    contents = read_contents(open_checkpoint(source))
    assert contents.unread == ()
    assert contents.storage is None
    assert contents.quantized.keys() == expected.values.keys()
    facts = fp8pack.inspect(source)
    shown = {tensor.name: tensor for tensor in facts.tensors if tensor.action == "packed"}
    assert {(t.format, t.granularity) for t in shown.values()} == {(expected.format, expected.granularity)}
    assert {name: tensor.shape for name, tensor in shown.items()} == {n: v.shape for n, v in expected.values.items()}
    assert facts.engines == ()
    compared = fp8pack.diff(source, source).totals
    assert compared.num_equal == compared.num_tensors >= len(facts.tensors)


@pytest.mark.parametrize("name", CASES)
def test_they_differ_from_what_they_are_unpacked_to_by_nothing_but_rounding(name: str, tmp_path: Path) -> None:
    source = CASES[name]().write(tmp_path / "model")
    fp8pack.unpack(source, tmp_path / "out", dtype="float32")
    assert fp8pack.inspect(source, tmp_path / "out").totals.sqnr_min == 1000
    compared = fp8pack.diff(source, tmp_path / "out").totals
    assert compared.num_equal == compared.num_tensors >= len(read_tensors(tmp_path / "out"))


@pytest.mark.parametrize("name", ["gpt-oss", "INT4, group", "NVFP4 of ModelOpt"])
def test_they_are_never_loaded_as_if_they_were_fp8(name: str, tmp_path: Path) -> None:
    source = CASES[name]().write(tmp_path / "model")
    for load in (fp8pack.load_packed, fp8pack.load_model):
        with pytest.raises(InputError, match="only FP8 weights are loaded") as caught:
            load(source)
        assert "fp8pack convert" in caught.value.command_line
        assert "fp8pack unpack" in caught.value.command_line


# What lacks something, or contradicts itself.


def without(leaf: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        del tensors[next(name for name in tensors if name.endswith(leaf))]

    return change


def replaced(leaf: str, tensor: Any) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[next(name for name in tensors if name.endswith(leaf))] = tensor

    return change


def added(leaf: str, tensor: Any) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[f"{MODULE}.{leaf}"] = tensor

    return change


REFUSED: dict[str, tuple[str, Callable[[Tensors], None], str]] = {
    "no scales of blocks": ("gpt-oss", without("down_proj_scales"), "has no scales"),
    "no blocks": ("gpt-oss", without("down_proj_blocks"), "without a quantized weight"),
    "scales of another shape": ("gpt-oss", replaced("down_proj_scales", np.ones((3, 64, 2), np.uint8)), "not fit"),
    "scales in floats": ("gpt-oss", replaced("down_proj_scales", np.ones((3, 64, 3), np.float32)), "not fit"),
    "blocks of three dimensions": ("gpt-oss", replaced("down_proj_blocks", codes((3, 64, 48))), "not fit"),
    "blocks of 8": ("gpt-oss", replaced("down_proj_blocks", codes((3, 64, 3, 8))), "not fit"),
    "INT4 without a scale": ("INT4, group", without("weight_scale"), "has no scale"),
    "INT4 without a weight": ("INT4, group", without("weight_packed"), "without a quantized weight"),
    "INT4 without its shape": ("INT4, group", without("weight_shape"), "has no `weight_shape`"),
    "INT4 of a vector": ("INT4, group", replaced("weight_packed", np.ones(48, np.int32)), "neither INT4 nor INT8"),
    "three bits": ("INT4, group", replaced("weight_packed", np.ones((48, 18), np.int32)), "neither INT4 nor INT8"),
    "INT8 where INT4 is declared": (
        "INT4, group", replaced("weight_packed", np.ones((48, 48), np.int32)), "neither INT4 nor INT8",
    ),
    "another shape": ("INT4, group", replaced("weight_shape", np.array([48, 200])), "neither INT4 nor INT8"),
    "a huge shape": ("INT4, group", replaced("weight_shape", np.array([48, 2**62])), "neither INT4 nor INT8"),
    "a negative shape": ("INT4, group", replaced("weight_shape", np.array([-48, -192])), "neither INT4 nor INT8"),
    "a shape of three": ("INT4, group", replaced("weight_shape", np.array([48, 192, 1])), "not fit"),
    "a shape in floats": ("INT4, group", replaced("weight_shape", np.ones(2, np.float32)), "not fit"),
    "another group": ("INT4, group", replaced("weight_scale", np.ones((48, 3), np.float32)), "no known scale region"),
    "no group": ("INT4, group", replaced("weight_scale", np.ones((48, 5), np.float32)), "no known scale region"),
    "exponents of integers": ("INT4, group", replaced("weight_scale", np.ones((48, 6), np.uint8)), "not fit"),
    "no zero point": ("INT4, asymmetric, group", without("weight_zero_point"), "has no zero point"),
    "a zero point too few": (
        "INT4, asymmetric, group", replaced("weight_zero_point", np.ones((5, 6), np.int32)), "not fit",
    ),
    "zero points in floats": (
        "INT4, asymmetric, group", replaced("weight_zero_point", np.ones((48, 6), np.float32)), "not fit",
    ),
    "INT8 with a zero point too few": (
        "INT8, not packed, asymmetric", replaced("weight_zero_point", np.ones(47, np.int8)), "not fit",
    ),
    "an order of columns": ("INT4, group", added("weight_g_idx", np.zeros(192, np.int32)), "weight_g_idx"),
    "AWQ": ("NVFP4 of ModelOpt", added("pre_quant_scale", np.ones(192, np.float32)), "pre_quant_scale"),
    "NVFP4 without a second scale": ("NVFP4 of ModelOpt", without("weight_scale_2"), "has no second scale"),
    "NVFP4 without a global scale": (
        "NVFP4 of compressed-tensors", without("weight_global_scale"), "has no second scale",
    ),
    "NVFP4 without scales": ("NVFP4 of compressed-tensors", without("weight_scale"), "has no scale"),
    "NVFP4 without a weight": ("NVFP4 of compressed-tensors", without("weight_packed"), "without a quantized weight"),
    "NVFP4 in groups of 32": (
        "NVFP4 of ModelOpt", replaced("weight_scale", np.ones((48, 6), ml_dtypes.float8_e4m3fn)), "not fit",
    ),
    "two second scales": ("NVFP4 of ModelOpt", replaced("weight_scale_2", np.ones(2, np.float32)), "not fit"),
    "a second scale of zero": (
        "NVFP4 of compressed-tensors", replaced("weight_global_scale", np.zeros(1, np.float32)), "not finite",
    ),
    "a negative second scale": ("NVFP4 of ModelOpt", replaced("weight_scale_2", -np.ones((), np.float32)), "negative"),
    "MXFP4 in groups of 16": (
        "MXFP4 of compressed-tensors", replaced("weight_scale", np.ones((48, 12), np.uint8)), "not fit",
    ),
    "MXFP4 with floats": (
        "MXFP4 of compressed-tensors", replaced("weight_scale", np.ones((48, 6), np.float32)), "not fit",
    ),
    "an exponent of 255": (
        "MXFP4 of compressed-tensors", replaced("weight_scale", np.full((48, 6), 255, np.uint8)), "not finite",
    ),
    "a value out of range": (
        "MXFP4 of compressed-tensors", replaced("weight_scale", np.full((48, 6), 254, np.uint8)), "out of range",
    ),
    "DeepSeek-V4 in groups of 16": (
        "DeepSeek-V4", replaced("w1.scale", np.ones((48, 12), E8M0)), "not fit",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_incomplete_is_refused_in_one_sentence(name: str, tmp_path: Path) -> None:
    base, change, words = REFUSED[name]
    expected = CASES[base]()
    change(expected.tensors)
    source = expected.write(tmp_path / "model")
    runs: tuple[Callable[[], object], ...] = (
        lambda: fp8pack.unpack(source, tmp_path / "unpacked"),
        lambda: fp8pack.convert(source, tmp_path / "converted", scheme="FP8_DYNAMIC"),
        lambda: fp8pack.pack(source, tmp_path / "packed", scheme="FP8_DYNAMIC"),
    )
    for run in runs if words != "out of range" else runs[:1]:
        with pytest.raises(InputError) as caught:
            run()
        message = caught.value.command_line
        assert len(message.splitlines()) == 1
        if run is not runs[2] or words in ("not fit", "not finite"):  # to `pack` some of them are no such weights
            assert words in message
            assert "experts" in message or MODULE in message
    assert not {"unpacked", "converted", "packed"}.intersection(path.name for path in tmp_path.iterdir())


EMPTY: dict[str, Tensors] = {
    "no experts": {f"{EXPERTS}.w2_blocks": codes((0, 4, 2, 16)), f"{EXPERTS}.w2_scales": codes((0, 4, 2))},
    "no groups": {f"{EXPERTS}.w2_blocks": codes((2, 4, 0, 16)), f"{EXPERTS}.w2_scales": codes((2, 4, 0))},
    "INT4 without columns": {
        f"{MODULE}.weight_packed": np.zeros((4, 0), np.int32),
        f"{MODULE}.weight_scale": np.ones((4, 1), np.float32),
        f"{MODULE}.weight_shape": np.array([4, 0]),
    },
    "INT8 without rows": {
        f"{MODULE}.weight": codes((0, 8)).view(np.int8),
        f"{MODULE}.weight_scale": np.ones((0, 1), "f4"),
    },
}


@pytest.mark.parametrize("name", EMPTY)
def test_weights_without_elements_are_no_error(name: str, tmp_path: Path) -> None:
    source = LowBits(EMPTY[name], {"quant_method": "other"}, {}, "", "", {}).write(tmp_path / "model")
    facts = fp8pack.unpack(source, tmp_path / "out")
    assert facts.num_unpacked == 1
    assert fp8pack.inspect(source).totals.num_packed == 1


def test_weights_whose_inputs_are_rotated_are_refused(tmp_path: Path) -> None:
    """Their values are right, and the model without its rotations is not."""
    expected = CASES["INT4, group"]()
    expected.quantization["transform_config"] = {"config_groups": {"u": {"type": "hadamard", "apply": []}}}
    source = expected.write(tmp_path / "model")
    with pytest.raises(InputError, match="transform_config"):
        fp8pack.unpack(source, tmp_path / "out")


def test_scales_of_k_and_v_stay_with_a_conversion(tmp_path: Path) -> None:
    expected = CASES["NVFP4 of ModelOpt"]()
    for kind in "kv":
        expected.tensors[f"model.layers.0.self_attn.{kind}_proj.{kind}_scale"] = np.float32(0.5).reshape(())
    source = expected.write(tmp_path / "model")
    fp8pack.convert(source, tmp_path / "converted", scheme="FP8_DYNAMIC")
    assert "model.layers.0.self_attn.k_scale" in read_tensors(tmp_path / "converted")
    facts = fp8pack.pack(source, tmp_path / "packed", scheme="FP8_DYNAMIC")
    assert any("scales of K and V are dropped" in warning for warning in facts.warnings)
    assert not any("k_scale" in name for name in read_tensors(tmp_path / "packed"))


@pytest.mark.parametrize("leaf", ["weight.absmax", "weight.quant_state.bitsandbytes__nf4", "SCB"])
def test_bitsandbytes_is_refused_with_the_way_out(leaf: str, tmp_path: Path) -> None:
    tensors: Tensors = {f"{MODULE}.weight": codes((4096, 1)), f"{MODULE}.{leaf}": np.ones(64, np.float32)}
    source = LowBits(tensors, {"quant_method": "bitsandbytes", "load_in_4bit": True}, {}, "", "", {}).write(
        tmp_path / "model"
    )
    for run in (fp8pack.unpack, fp8pack.pack, fp8pack.convert):
        with pytest.raises(InputError, match="bitsandbytes") as caught:
            run(source, tmp_path / "out")
        assert "model.dequantize()" in caught.value.command_line


def test_experts_of_deepseek_v4_lie_beside_fp8(tmp_path: Path) -> None:
    expected = CASES["DeepSeek-V4"]()
    weight = np.ones((128, 128), ml_dtypes.float8_e4m3fn)
    expected.tensors |= {f"{MODULE}.weight": weight, f"{MODULE}.scale": np.full((1, 1), 2, E8M0)}
    expected.values[f"{MODULE}.weight"] = np.full((128, 128), 2, ml_dtypes.bfloat16)
    source = expected.write(tmp_path / "model")
    assert BLOCKS.items() <= expected.quantization.items()
    contents = read_contents(open_checkpoint(source))
    assert {quantized.kind for quantized in contents.quantized.values()} == {"FP4", "FP8"}
    assert contents.storage
    assert contents.storage.granularity.name == "block:128x128"
    fp8pack.unpack(source, tmp_path / "out")
    check(read_tensors(tmp_path / "out"), expected)
    fp8pack.convert(source, tmp_path / "fp8", scheme="FP8_DYNAMIC")
    packed = read_contents(open_checkpoint(tmp_path / "fp8"))
    assert packed.quantized.keys() == {f"{MODULE}.weight", f"{EXPERTS}.0.w1.weight"}
    with pytest.raises(InputError, match="already"):
        fp8pack.pack(source, tmp_path / "packed")
