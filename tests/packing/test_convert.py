"""From one FP8 convention to another: bytes that are carried stay, everything else is dequantized and packed anew."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ml_dtypes
import numpy as np
import oracle
import pytest
import torch
from checkpoints import Tensors, llama_config, random_weight, read_tensors, write_model, write_shard
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from typer.testing import CliRunner

import fp8pack
from fp8pack.checkpoint.calibration_file import write_calibration
from fp8pack.checkpoint.quant_methods import METHODS
from fp8pack.checkpoint.quantized import read_contents
from fp8pack.checkpoint.source import open_checkpoint
from fp8pack.cli.app import app
from fp8pack.errors import Fp8PackError, InputError, OutputError, RecipeError
from fp8pack.modelfacts.patterns import Pattern
from fp8pack.numerics.formats import parse_format
from fp8pack.numerics.granularity import parse_granularity
from fp8pack.numerics.scaling import ScaleRounding
from fp8pack.packing import bands, codecs, execute
from fp8pack.packing.prepare import WriteOptions
from fp8pack.planning import make_plan
from fp8pack.planning.calibration import Calibration, Site
from fp8pack.planning.recipe import Request, Rule, RuleAction

E4M3, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16
LAYER = "model.layers.0"
ATTENTION = f"{LAYER}.self_attn"
LINEARS = {
    f"{ATTENTION}.q_proj": (256, 256),
    f"{ATTENTION}.k_proj": (128, 256),
    f"{ATTENTION}.v_proj": (128, 256),
    f"{ATTENTION}.o_proj": (256, 256),
    f"{LAYER}.mlp.gate_proj": (384, 256),
    f"{LAYER}.mlp.up_proj": (384, 256),
    f"{LAYER}.mlp.down_proj": (256, 384),
}
WEIGHTS = [f"{module}.weight" for module in LINEARS]


def config_of(**more: Any) -> dict[str, Any]:
    return llama_config(layers=1) | {"hidden_size": 256} | more


def float_weights(shapes: dict[str, tuple[int, int]] | None = None) -> Tensors:
    return {
        f"{module}.weight": random_weight(shape, i) for i, (module, shape) in enumerate((shapes or LINEARS).items())
    }


def others() -> Tensors:
    return {
        "model.embed_tokens.weight": random_weight((32, 256), 50),
        f"{LAYER}.input_layernorm.weight": random_weight((256,), 51),
        f"{LAYER}.mlp.gate.weight": random_weight((4, 256), 52),
        "lm_head.weight": random_weight((32, 256), 53),
    }


def quantized(
    granularity: str, rounding: str = "none", format: str = "e4m3", shapes: dict[str, tuple[int, int]] | None = None
) -> dict[str, tuple[NDArray[Any], NDArray[np.float32]]]:
    """Payload and scales of each weight, by the oracle."""
    found = {}
    for name, weight in float_weights(shapes).items():
        codes, scales = oracle.quantize(weight.astype(np.float32), format, granularity, rounding)
        found[name] = (codes.view(oracle.ELEMENT[format][0]), scales)
    return found


def values_of(
    packed: dict[str, tuple[NDArray[Any], NDArray[np.float32]]], granularity: str
) -> dict[str, NDArray[np.float32]]:
    return {
        name: codes.astype(np.float32)
        * oracle.spread(scales, oracle.region_of(granularity, codes.shape), (codes.shape[0], codes.shape[1]))
        for name, (codes, scales) in packed.items()
    }


def source_of(
    folder: Path,
    granularity: str,
    activations: str = "dynamic",
    rounding: str = "none",
    format: str = "e4m3",
    *,
    shapes: dict[str, tuple[int, int]] | None = None,
    shards: int = 1,
    extra: Tensors | None = None,
) -> Path:
    """A checkpoint of fp8pack's own convention, written without fp8pack."""
    tensors = others() | (extra or {})
    for i, (name, (codes, scales)) in enumerate(quantized(granularity, rounding, format, shapes).items()):
        exponents = granularity == "mx" or rounding == "up"
        grid = scales.reshape(()) if granularity == "tensor" else scales
        stored = scales.astype(ml_dtypes.float8_e8m0fnu).view(np.uint8) if granularity == "mx" else grid
        tensors |= {name: codes, f"{name}_scale_inv": stored}
        if activations == "static":
            tensors[f"{name.removesuffix('.weight')}.input_scale"] = np.float32(0.5 + i).reshape(())
    quantization = {
        "quant_method": "fp8pack",
        "format": format,
        "granularity": granularity,
        "activation_scheme": activations,
        **({"scale_fmt": "ue8m0"} if exponents and granularity != "mx" else {}),
    }
    return write_model(folder, tensors, config_of(quantization_config=quantization), shards=shards)


def as_bytes(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {name: (str(t.dtype), t.shape, t.tobytes()) for name, t in read_tensors(folder).items()}


def asked(granularity: str | None = None, method: str | None = None, **changes: Any) -> Request:
    return Request(granularity=parse_granularity(granularity) if granularity else None, quant_method=method, **changes)


def convert(source: Path, output: Path, request: Request, **options: Any) -> Tensors:
    fp8pack.convert(source, request, WriteOptions(output, **options))
    return read_tensors(output)


# There and back.

STORED = [
    ("tensor", "dynamic", "none"),
    ("tensor", "static", "none"),
    ("tensor", "none", "none"),
    ("channel", "dynamic", "none"),
    ("channel", "none", "none"),
    ("block:128x128", "dynamic", "none"),
    ("block:128x128", "dynamic", "up"),
    ("mx", "dynamic", "up"),
    ("group:64", "dynamic", "none"),
]
SPELLED = [*(method.name for method in METHODS), "fp8 for transformers"]


def request_for(spelling: str) -> Request:
    if spelling == "fp8 for transformers":
        return Request(quant_method="fp8", targets=("transformers",))
    return Request(quant_method=spelling)


def as_convention(source: Path, folder: Path, spelling: str) -> Path | None:
    """The checkpoint in a convention, None where that cannot express it."""
    folder.mkdir(parents=True, exist_ok=True)
    output = folder / spelling
    try:
        facts = fp8pack.convert(source, request_for(spelling), WriteOptions(output))
    except RecipeError:
        return None
    assert facts["num_carried"] == len(LINEARS), (spelling, facts["num_carried"])
    return output


def config_text(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text()))


def sorted_lists(value: Any) -> Any:
    """The value with the names in its lists in one order."""
    if isinstance(value, dict):
        return {key: sorted_lists(inner) for key, inner in value.items()}
    return sorted(value) if isinstance(value, list) and all(isinstance(item, str) for item in value) else value


@pytest.mark.parametrize(("granularity", "activations", "rounding"), STORED, ids=str)
def test_every_convention_comes_back_from_every_other_with_the_same_bytes(
    granularity: str, activations: str, rounding: str, tmp_path: Path
) -> None:
    """Run with `pytest -s` for the matrix."""
    source = source_of(tmp_path / "source", granularity, activations, rounding)
    firsts = {spelling: as_convention(source, tmp_path / "first", spelling) for spelling in SPELLED}
    able = [spelling for spelling, first in firsts.items() if first is not None]
    print(f"\n{granularity}, {activations}, {rounding}: {', '.join(able)}")
    different, changed = [], []
    for a, b in product(able, able):
        first = firsts[a]
        assert first is not None
        there = as_convention(first, tmp_path / "there" / a, b)
        assert there is not None, (a, b)
        back = as_convention(there, tmp_path / "back" / a / b, a)
        assert back is not None, (a, b)
        if as_bytes(back) != as_bytes(first):
            different.append((a, b))
        told = rounding == "none" or granularity == "mx"  # few conventions say that float32 scales are powers of two
        if told and sorted_lists(config_text(back)) != sorted_lists(config_text(first)):
            changed.append((a, b))
    for a in able:
        cells = ["x" if (a, b) in different else "c" if (a, b) in changed else "=" for b in able]
        print(f"  {a:22} {' '.join(cells)}")
    assert "fp8pack" in able
    assert len(able) > 1 or granularity == "group:64"
    assert different == []
    assert changed == []


@pytest.mark.parametrize(("granularity", "activations", "rounding"), STORED, ids=str)
def test_what_a_convention_says_of_activations_and_scales_is_read_back(
    granularity: str, activations: str, rounding: str, tmp_path: Path
) -> None:
    source = source_of(tmp_path / "source", granularity, activations, rounding)
    said = {}
    for spelling in SPELLED:
        if (output := as_convention(source, tmp_path, spelling)) is not None:
            storage = read_contents(open_checkpoint(output)).storage
            assert storage is not None
            assert storage.granularity.name == granularity
            said[spelling] = (storage.activations, storage.powers_of_two)
            values = fp8pack.load_packed(output)
            for name, expected in values_of(quantized(granularity, rounding), granularity).items():
                found = values[name].dequantize(torch.float32).numpy()
                np.testing.assert_array_equal(found, expected, err_msg=f"{spelling} {name}")
    assert {name: what[0] for name, what in said.items()} == dict.fromkeys(said, activations)


# What is carried.

FINER = [
    ("tensor", "none", "channel", "compressed-tensors"),
    ("tensor", "none", "block:128x128", "fp8"),
    ("tensor", "none", "block:128x128", "modelopt"),
    ("tensor", "none", "group:64", "compressed-tensors"),
    ("channel", "none", "group:64", "compressed-tensors"),
    ("channel", "none", "group:32", "fp8pack"),
    ("block:128x128", "none", "block:64x32", "fp8pack"),
    ("block:128x128", "none", "group:128", "compressed-tensors"),
    ("block:128x128", "up", "mx", "modelopt"),
    ("block:128x128", "up", "mx", "comfyui"),
    ("block:32x32", "up", "mx", "compressed-tensors"),
    ("block:32x32", "up", "mx", "mxfp8"),
    ("channel", "up", "mx", "quark"),
    ("tensor", "up", "mx", "mxfp8"),
]


@pytest.mark.parametrize(("coarse", "rounding", "fine", "method"), FINER, ids=str)
def test_bytes_are_carried_where_scales_become_finer(
    coarse: str, rounding: str, fine: str, method: str, tmp_path: Path
) -> None:
    source = source_of(tmp_path / "source", coarse, rounding=rounding)
    facts = fp8pack.convert(source, asked(fine, method), WriteOptions(tmp_path / "out"))
    assert facts["num_carried"] == len(LINEARS)
    loaded, packed = fp8pack.load_packed(tmp_path / "out"), quantized(coarse, rounding)
    for name, values in values_of(packed, coarse).items():
        assert loaded[name].granularity == fine
        assert loaded[name].data.view(torch.uint8).numpy().tobytes() == packed[name][0].tobytes()
        np.testing.assert_array_equal(loaded[name].dequantize(torch.float32).numpy(), values)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.sampled_from([1, 2, 7, 32, 64, 130]), st.sampled_from([1, 5, 32, 96, 128, 300])),
    theirs=st.sampled_from(["tensor", "channel", "group:32", "group:48", "block:32x32", "block:128x128", "block:7x5"]),
    ours=st.sampled_from(
        ["tensor", "channel", "group:16", "group:96", "block:16x32", "block:64x64", "block:7x5", "mx"]
    ),
    rounding=st.sampled_from(["none", "up"]),
)
def test_any_regions_are_carried_if_each_lies_within_one_of_theirs_and_else_packed_anew(
    shape: tuple[int, int], theirs: str, ours: str, rounding: str
) -> None:
    shapes = {f"{LAYER}.mlp.down_proj": shape}
    with TemporaryDirectory() as folder:
        source = source_of(Path(folder) / "source", theirs, rounding=rounding, shapes=shapes)
        request = asked(ours, "fp8pack", scale_rounding=ScaleRounding(rounding) if ours != "mx" else None)
        facts = fp8pack.convert(source, request, WriteOptions(Path(folder) / "out"))
        loaded = fp8pack.load_packed(Path(folder) / "out")
        ((name, values),) = values_of(quantized(theirs, rounding, shapes=shapes), theirs).items()
        number = np.arange(values.size, dtype=np.float32)
        regions = [
            oracle.spread(number[: rows * cols].reshape(rows, cols), region, shape)
            for region in (oracle.region_of(theirs, shape), oracle.region_of(ours, shape))
            for rows, cols in [(-(-shape[0] // region[0]), -(-shape[1] // region[1]))]
        ]
        pairs = np.unique(np.stack([grid.ravel() for grid in regions]), axis=1).shape[1]
        within = pairs == np.unique(regions[1]).size
        carried = within and (rounding == "up" or ours != "mx")
        found = loaded[name].dequantize(torch.float32).numpy().copy()
        assert facts["num_carried"] == int(carried)
        if not carried:
            codes, scales = oracle.quantize(values, "e4m3", ours, "up" if ours == "mx" else rounding)
            spread = oracle.spread(scales, oracle.region_of(ours, shape), shape)
            values = codes.view(E4M3).astype(np.float32) * spread
        np.testing.assert_array_equal(found, values)


def test_a_block_that_reaches_over_a_weights_edge_covers_its_rows_and_columns(tmp_path: Path) -> None:
    """96 columns lie within one block of 128, though 128 is no multiple of 96."""
    shapes = {f"{LAYER}.mlp.down_proj": (64, 96), f"{ATTENTION}.o_proj": (80, 48)}
    source = source_of(tmp_path / "source", "block:128x128", shapes=shapes)
    for granularity in ("channel", "tensor", "group:32", "block:128x128"):
        facts = fp8pack.convert(source, asked(granularity, "fp8pack"), WriteOptions(tmp_path / granularity))
        loaded = fp8pack.load_packed(tmp_path / granularity)
        for name, values in values_of(quantized("block:128x128", shapes=shapes), "block:128x128").items():
            np.testing.assert_array_equal(loaded[name].dequantize(torch.float32).numpy(), values)
        assert facts["num_carried"] == len(shapes), granularity


def test_bytes_are_carried_in_bands_strips_and_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {f"{LAYER}.mlp.down_proj": (200, 1000), f"{ATTENTION}.o_proj": (128, 256)}
    source = source_of(tmp_path / "source", "block:128x128", rounding="up", shapes=shapes)
    monkeypatch.setattr(codecs.CpuCodec, "strip_nbytes", 300)
    monkeypatch.setattr(make_plan, "BAND_NBYTES", 1000)
    for granularity in ("block:64x32", "group:64", "mx"):
        monkeypatch.setattr(make_plan, "MAX_GRANULE_NBYTES", 16 << 20)
        convert(source, tmp_path / f"rows-{granularity}", asked(granularity, "fp8pack"), workers=3)
        monkeypatch.setattr(make_plan, "MAX_GRANULE_NBYTES", 500)
        convert(source, tmp_path / f"columns-{granularity}", asked(granularity, "fp8pack"))
        for kind in ("rows", "columns"):
            loaded = fp8pack.load_packed(tmp_path / f"{kind}-{granularity}")
            for name, values in values_of(quantized("block:128x128", "up", shapes=shapes), "block:128x128").items():
                np.testing.assert_array_equal(loaded[name].dequantize(torch.float32).numpy(), values)


@pytest.mark.parametrize("dtype", [BF16, np.float16])
def test_scales_of_16_bits_are_widened_to_the_same_numbers(dtype: Any, tmp_path: Path) -> None:
    tensors, expected = others(), {}
    for name, (codes, scales) in quantized("block:128x128").items():
        tensors |= {name: codes, f"{name}_scale_inv": scales.astype(dtype)}
        expected[name] = scales.astype(dtype).astype(np.float32)
    config = config_of(quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    source = write_model(tmp_path / "source", tensors, config)
    found = convert(source, tmp_path / "out", asked(method="modelopt"))
    for name, scales in expected.items():
        assert found[name].tobytes() == tensors[name].tobytes()
        assert found[f"{name}_scale"].dtype == np.float32
        assert found[f"{name}_scale"].tobytes() == scales.tobytes()


def test_the_extremes_of_exponents_are_carried(tmp_path: Path) -> None:
    """2^-127, which tools write for blocks of zeros, is no normal float32."""
    codes = np.zeros((128, 128), np.uint8).view(E4M3)
    exponents = np.full((128, 4), 127, np.uint8)
    exponents[0], exponents[1], exponents[2] = 0, 254, 1
    name = f"{LAYER}.mlp.down_proj.weight"
    config = config_of(quantization_config={"quant_method": "mxfp8", "weight_block_size": [1, 32]})
    source = write_model(tmp_path / "source", {name: codes, f"{name}_scale_inv": exponents}, config)
    found = convert(source, tmp_path / "out", asked(method="modelopt"))
    assert found[f"{name}_scale"].tobytes() == exponents.tobytes()


def test_announced_powers_of_two_that_are_none_are_refused(tmp_path: Path) -> None:
    source = source_of(tmp_path / "source", "block:128x128", rounding="up")
    tensors = read_tensors(source)
    name = f"{WEIGHTS[0]}_scale_inv"
    write_shard(source / "model.safetensors", tensors | {name: tensors[name] * np.float32(1.5)})
    with pytest.raises(InputError, match="powers of two"):
        fp8pack.convert(source, asked("mx", "mxfp8"), WriteOptions(tmp_path / "out"))


def test_a_scale_of_zero_is_refused_with_the_way_out(tmp_path: Path) -> None:
    source = source_of(tmp_path / "source", "channel")
    tensors = read_tensors(source)
    name = f"{WEIGHTS[0]}_scale_inv"
    scales = tensors[name].copy()
    scales[3] = 0
    write_shard(source / "model.safetensors", tensors | {name: scales})
    with pytest.raises(InputError) as caught:
        fp8pack.convert(source, asked(method="compressed-tensors"), WriteOptions(tmp_path / "out"))
    assert name in str(caught.value)
    assert "fp8pack unpack" in str(caught.value)
    fp8pack.unpack(source, options=WriteOptions(tmp_path / "floats"))
    fp8pack.pack(tmp_path / "floats", asked(method="compressed-tensors"), WriteOptions(tmp_path / "b"))


# What is quantized anew.

ANEW = [
    ("channel", "none", "e4m3", "block:128x128", "fp8"),
    ("block:128x128", "none", "e4m3", "channel", "compressed-tensors"),
    ("block:128x128", "none", "e4m3", "tensor", "fp8"),
    ("tensor", "none", "e4m3", "mx", "modelopt"),
    ("mx", "up", "e4m3", "block:128x128", "quark"),
    ("mx", "up", "e4m3", "tensor", "comfyui"),
    ("group:64", "none", "e4m3", "group:48", "fp8pack"),
    ("tensor", "none", "e5m2", "channel", "compressed-tensors"),
    ("block:48x80", "none", "e5m2", "mx", "comfyui"),
]


@pytest.mark.parametrize(("theirs", "rounding", "format", "ours", "method"), ANEW, ids=str)
def test_what_is_quantized_anew_is_our_pack_of_the_dequantized_weights(
    theirs: str, rounding: str, format: str, ours: str, method: str, tmp_path: Path
) -> None:
    source = source_of(tmp_path / "source", theirs, rounding=rounding, format=format)
    fp8pack.unpack(source, "float32", WriteOptions(tmp_path / "floats"))
    request = asked(ours, method, format=parse_format("e4m3"))
    facts = fp8pack.convert(source, request, WriteOptions(tmp_path / "out", workers=2))
    assert facts["num_carried"] == 0
    assert facts["num_packed"] == len(LINEARS)
    fp8pack.pack(tmp_path / "floats", request, WriteOptions(tmp_path / "expected"))
    assert as_bytes(tmp_path / "out") == as_bytes(tmp_path / "expected")
    dtype = {"dtype": "bfloat16"}  # of the floats in between, which do not say so
    assert sorted_lists(config_text(tmp_path / "out")) == sorted_lists(config_text(tmp_path / "expected")) | dtype


def test_what_is_quantized_anew_is_the_same_in_bands_strips_and_on_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = {f"{LAYER}.mlp.down_proj": (200, 1000), f"{ATTENTION}.o_proj": (128, 256)}
    source = source_of(tmp_path / "source", "block:48x80", shapes=shapes, shards=2)
    requests = {name: asked(name, "fp8pack") for name in ("tensor", "channel", "block:128x128", "mx")}
    for name, request in requests.items():
        convert(source, tmp_path / f"{name}-whole", request, workers=1)
        convert(source, tmp_path / f"{name}-torch", request, device="torch:cpu")
    monkeypatch.setattr(codecs.CpuCodec, "strip_nbytes", 2000)
    monkeypatch.setattr(make_plan, "BAND_NBYTES", 3000)
    for name, request in requests.items():
        convert(source, tmp_path / f"{name}-cut", request, max_memory=1)
        for kind in ("torch", "cut"):
            assert as_bytes(tmp_path / f"{name}-{kind}") == as_bytes(tmp_path / f"{name}-whole"), (name, kind)


@pytest.mark.parametrize("granularity", ["tensor", "channel", "mx"])
def test_files_that_were_cast_without_scales_keep_their_bytes_and_get_scales_of_one(
    granularity: str, tmp_path: Path
) -> None:
    tensors = {name: weight.astype(E4M3) for name, weight in float_weights().items()}
    source = write_model(tmp_path / "source", tensors | others(), config_of())
    found = convert(source, tmp_path / "out", asked(granularity, "compressed-tensors"))
    for name, weight in tensors.items():
        assert found[name].tobytes() == weight.tobytes()
        scales = found[f"{name}_scale"]
        assert (scales == (127 if granularity == "mx" else 1)).all()


def test_partial_blocks_of_the_source_are_carried_with_it(tmp_path: Path) -> None:
    """DeepSeek's kv_a_proj_with_mqa has 576 rows: where the blocks stay, so do the bytes."""
    shapes = {f"{ATTENTION}.o_proj": (128, 192), f"{LAYER}.mlp.down_proj": (200, 256)}
    source = source_of(tmp_path / "source", "block:128x128", shapes=shapes)
    facts = fp8pack.convert(source, asked(method="compressed-tensors"), WriteOptions(tmp_path / "out"))
    assert facts["num_carried"] == facts["num_packed"] == len(shapes)
    found, tensors = read_tensors(tmp_path / "out"), read_tensors(source)
    for name in shapes:
        assert found[f"{name}.weight"].tobytes() == tensors[f"{name}.weight"].tobytes()
        assert found[f"{name}.weight_scale"].tobytes() == tensors[f"{name}.weight_scale_inv"].tobytes()


def test_a_nan_byte_is_named_with_the_flag_that_keeps_it_out(tmp_path: Path) -> None:
    source = source_of(tmp_path / "source", "channel")
    tensors = read_tensors(source)
    bad = f"{LAYER}.mlp.down_proj.weight"
    codes = tensors[bad].view(np.uint8).copy()
    codes[2, 7] = 0xFF
    write_shard(source / "model.safetensors", tensors | {bad: codes.view(E4M3)})
    for i, request in enumerate((asked("block:128x128", "fp8"), asked(method="compressed-tensors"))):
        with pytest.raises(InputError) as caught:
            fp8pack.convert(source, request, WriteOptions(tmp_path / f"{i}"))
        assert bad in str(caught.value)
        assert WEIGHTS[0] not in str(caught.value)


def test_a_nan_byte_in_what_becomes_bf16_is_not_mended_by_the_flag_that_was_given(tmp_path: Path) -> None:
    source = source_of(tmp_path / "source", "channel")
    tensors = read_tensors(source)
    bad = f"{LAYER}.mlp.down_proj.weight"
    codes = tensors[bad].view(np.uint8).copy()
    codes[2, 7] = 0xFF
    write_shard(source / "model.safetensors", tensors | {bad: codes.view(E4M3)})
    request = asked(method="compressed-tensors", ignore=(Pattern(bad),))
    with pytest.raises(InputError) as caught:
        fp8pack.convert(source, request, WriteOptions(tmp_path / "out"))
    assert bad in str(caught.value)
    assert "--ignore" not in str(caught.value)


def test_members_of_a_fused_module_share_a_tensors_scale_though_some_could_be_carried(tmp_path: Path) -> None:
    """K and V lie within one block each, Q does not: a scale of their own would have engines quantize again."""
    shapes = {f"{ATTENTION}.q_proj": (256, 128), f"{ATTENTION}.k_proj": (128, 128), f"{ATTENTION}.v_proj": (128, 128)}
    source = source_of(tmp_path / "source", "block:128x128", shapes=shapes)
    found = convert(source, tmp_path / "out", asked("tensor", "fp8"))
    assert len({found[f"{module}.weight_scale"].item() for module in shapes}) == 1


# What becomes BF16.


def test_what_is_ignored_becomes_bf16_and_is_listed(tmp_path: Path) -> None:
    source = source_of(tmp_path / "source", "channel")
    ignored = f"{LAYER}.mlp.down_proj"
    request = asked("block:128x128", "fp8", ignore=(Pattern(ignored), Pattern("*.k_proj")))
    found = convert(source, tmp_path / "out", request)
    values = values_of(quantized("channel"), "channel")
    kept = {f"{ignored}.weight", *(f"{ATTENTION}.{kind}_proj.weight" for kind in "qkv")}
    for name in WEIGHTS:
        if name in kept:  # with k_proj go q_proj and v_proj
            assert found[name].tobytes() == values[name].astype(BF16).tobytes(), name
            assert f"{name}_scale_inv" not in found
        else:
            assert found[name].dtype == E4M3, name
    listed = config_text(tmp_path / "out")["quantization_config"]["modules_to_not_convert"]
    assert {name.removesuffix(".weight") for name in kept} <= set(listed)


def test_only_what_is_named_stays_fp8(tmp_path: Path) -> None:
    source = source_of(tmp_path / "source", "channel")
    request = asked(method="compressed-tensors", only=(Pattern("*.mlp.*"),))
    found = convert(source, tmp_path / "out", request)
    values = values_of(quantized("channel"), "channel")
    for name in WEIGHTS:
        if ".mlp." in name:
            assert found[name].dtype == E4M3
        else:
            assert found[name].tobytes() == values[name].astype(BF16).tobytes()
    assert found[f"{LAYER}.mlp.gate.weight"].tobytes() == others()[f"{LAYER}.mlp.gate.weight"].tobytes()


def test_shapes_that_engines_refuse_in_blocks_become_bf16_with_the_reason(tmp_path: Path) -> None:
    shapes = {**LINEARS, f"{ATTENTION}.v_proj": (64, 256), f"{LAYER}.mlp.down_proj": (130, 250)}
    source = source_of(tmp_path / "source", "channel", shapes=shapes)
    facts = fp8pack.convert(source, asked("block:128x128", "fp8"), WriteOptions(tmp_path / "out"))
    found, values = read_tensors(tmp_path / "out"), values_of(quantized("channel", shapes=shapes), "channel")
    kept = [f"{LAYER}.mlp.down_proj.weight", *(f"{ATTENTION}.{kind}_proj.weight" for kind in "qkv")]
    for name in kept:
        assert found[name].tobytes() == values[name].astype(BF16).tobytes(), name
    reasons = {entry["name"]: entry["reason"] for entry in facts["kept"]}
    assert "multiple of 128" in reasons[f"{LAYER}.mlp.down_proj.weight"]
    assert "kept with v_proj" in reasons[f"{ATTENTION}.q_proj.weight"]
    assert facts["num_unpacked"] == len(kept)


def test_a_float_weight_of_the_source_is_never_made_fp8(tmp_path: Path) -> None:
    name = f"{LAYER}.mlp.extra_proj.weight"
    source = source_of(tmp_path / "source", "channel", extra={name: random_weight((128, 128), 9)})
    found = convert(source, tmp_path / "out", asked("block:128x128", "fp8"))
    assert found[name].tobytes() == random_weight((128, 128), 9).tobytes()
    assert (
        name.removesuffix(".weight") in config_text(tmp_path / "out")["quantization_config"]["modules_to_not_convert"]
    )


# Scales of activations.

INPUT_NAMES = {
    "compressed-tensors": ("input_scale", (1,)),
    "modelopt": ("input_scale", ()),
    "quark": ("input_scale", ()),
    "fp8": ("input_scale", ()),
    "fp8 for transformers": ("activation_scale", ()),
    "comfyui": ("input_scale", ()),
    "comfyui-scaled": ("scale_input", ()),
    "fp8pack": ("input_scale", ()),
}


@pytest.mark.parametrize("spelling", INPUT_NAMES)
def test_static_scales_are_carried_under_each_name(spelling: str, tmp_path: Path) -> None:
    source = source_of(tmp_path / "source", "tensor", "static")
    found = convert(source, tmp_path / "out", request_for(spelling))
    leaf, shape = INPUT_NAMES[spelling]
    for i, module in enumerate(LINEARS):
        scale = found[f"{module}.{leaf}"]
        assert (scale.item(), scale.shape) == (0.5 + i, shape)
    assert len([name for name in found if name.endswith(leaf)]) == len(LINEARS)


def test_a_static_scale_lies_beside_its_weight_wherever_it_lay_before(tmp_path: Path) -> None:
    source = source_of(tmp_path / "source", "tensor", "static", shards=3)
    found = convert(source, tmp_path / "out", asked(method="modelopt"))
    place = {
        name: path.name
        for path in (tmp_path / "out").glob("*.safetensors")
        for name in read_tensors(path)
    }  # fmt: skip
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == place
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    apart = [
        module
        for module in LINEARS
        if len({place[f"{module}.{leaf}"] for leaf in ("weight", "weight_scale", "input_scale")}) > 1
    ]
    assert apart == []


def test_static_scales_are_left_behind_where_activations_become_dynamic(tmp_path: Path) -> None:
    source = source_of(tmp_path / "source", "tensor", "static")
    found = convert(source, tmp_path / "out", asked(method="fp8", activations="dynamic"))
    assert [name for name in found if "input" in name and "scale" in name] == []
    assert config_text(tmp_path / "out")["quantization_config"]["activation_scheme"] == "dynamic"


def test_a_weight_without_the_static_scale_that_others_have_is_named(tmp_path: Path) -> None:
    source = source_of(tmp_path / "source", "tensor", "static")
    tensors = read_tensors(source)
    gone = f"{LAYER}.mlp.up_proj.input_scale"
    write_shard(source / "model.safetensors", {name: t for name, t in tensors.items() if name != gone})
    with pytest.raises(InputError) as caught:
        fp8pack.convert(source, asked(method="modelopt"), WriteOptions(tmp_path / "out"))
    assert f"{LAYER}.mlp.up_proj" in str(caught.value)
    assert "--calibration" in str(caught.value)


KV_NAMES = {
    "compressed-tensors": (f"{ATTENTION}.k_scale", f"{ATTENTION}.v_scale", (1,)),
    "modelopt": (f"{ATTENTION}.k_proj.k_scale", f"{ATTENTION}.v_proj.v_scale", ()),
    "quark": (f"{ATTENTION}.k_proj.output_scale", f"{ATTENTION}.v_proj.output_scale", ()),
    "fp8": (f"{ATTENTION}.k_scale", f"{ATTENTION}.v_scale", ()),
    "fp8pack": (f"{ATTENTION}.k_scale", f"{ATTENTION}.v_scale", ()),
}


@pytest.mark.parametrize("spelling", KV_NAMES)
@pytest.mark.parametrize("theirs", [*KV_NAMES, "kv_scale"])
def test_scales_of_k_and_v_are_carried_under_each_name(theirs: str, spelling: str, tmp_path: Path) -> None:
    k, v, shape = KV_NAMES.get(theirs, (f"{ATTENTION}.kv_scale", "", ()))
    extra: Tensors = {k: np.full(shape, 2, np.float32)} | ({v: np.full(shape, 3, np.float32)} if v else {})
    source = source_of(tmp_path / "source", "block:128x128", extra=extra)
    found = convert(source, tmp_path / "out", asked(method=spelling))
    k, v, shape = KV_NAMES[spelling]
    assert (found[k].item(), found[k].shape) == (2.0, shape)
    assert (found[v].item(), found[v].shape) == (2.0 if theirs == "kv_scale" else 3.0, shape)
    assert len([name for name in found if "scale" in name and not name.startswith(tuple(WEIGHTS))]) == 2
    assert set(read_contents(open_checkpoint(tmp_path / "out")).kv_scales) == {f"{ATTENTION}.k", f"{ATTENTION}.v"}
    quantization = config_text(tmp_path / "out")["quantization_config"]
    assert (quantization.get("kv_cache_scheme") or quantization.get("kv_cache_quant_config")) is not None
    if spelling == "modelopt":
        document = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())
        assert document["quantization"]["kv_cache_quant_algo"] == "FP8"


@pytest.mark.parametrize("spelling", ["compressed-tensors", "fp8pack"])
def test_scales_of_each_head_are_carried_whole(spelling: str, tmp_path: Path) -> None:
    extra = {f"{ATTENTION}.{kind}_scale": np.arange(1, 3, dtype=BF16).reshape(2, 1, 1) for kind in "kv"}
    source = source_of(tmp_path / "source", "block:128x128", extra=extra)
    found = convert(source, tmp_path / "out", asked(method=spelling))
    for name, scale in extra.items():
        assert found[name].shape == (2, 1, 1)
        assert found[name].astype(np.float32).tolist() == scale.astype(np.float32).tolist()


@pytest.mark.parametrize("spelling", ["modelopt", "quark", "fp8"])
def test_scales_of_each_head_are_refused_or_become_one_where_engines_read_one(spelling: str, tmp_path: Path) -> None:
    extra = {f"{ATTENTION}.{kind}_scale": np.arange(1, 3, dtype=np.float32).reshape(2, 1, 1) for kind in "kv"}
    source = source_of(tmp_path / "source", "block:128x128", extra=extra)
    try:
        found = convert(source, tmp_path / "out", asked(method=spelling))
    except Fp8PackError as error:
        assert len(str(error).splitlines()) == 1
    else:
        k, v, _ = KV_NAMES[spelling]
        assert found[k].size == found[v].size == 1


def test_compressed_tensors_says_that_the_scales_are_those_of_heads(tmp_path: Path) -> None:
    extra = {f"{ATTENTION}.{kind}_scale": np.arange(1, 3, dtype=np.float32).reshape(2, 1, 1) for kind in "kv"}
    source = source_of(tmp_path / "source", "channel", extra=extra)
    convert(source, tmp_path / "out", asked(method="compressed-tensors"))
    scheme = config_text(tmp_path / "out")["quantization_config"]["kv_cache_scheme"]
    assert scheme["strategy"] == "attn_head"


def test_modelopt_keeps_the_scales_of_a_fused_projection_at_the_attention(tmp_path: Path) -> None:
    """As a pack writes them: there is no k_proj to hold them."""
    shapes = {f"{ATTENTION}.qkv_proj": (512, 128), f"{ATTENTION}.o_proj": (128, 256)}
    extra = {f"{ATTENTION}.qkv_proj.{kind}_scale": np.ones((), np.float32) for kind in "kv"}
    source = source_of(tmp_path / "source", "block:128x128", shapes=shapes, extra=extra)
    found = convert(source, tmp_path / "out", asked(method="modelopt"))
    assert {name for name in found if name.endswith(("k_scale", "v_scale"))} == {
        f"{ATTENTION}.k_scale",
        f"{ATTENTION}.v_scale",
    }


def site(points: tuple[str, ...], bits: int) -> Site:
    top = np.array([bits], np.uint16)
    return Site(points, 64, top, np.array([64], np.int64), top, np.ones(1), top)


def calibrate(source: Path, fingerprint: str | None = None, *, inputs: bool = False) -> Path:
    """A calibration by hand: K and V with an amax of 448 and 896, and what enters weights with one of 224."""
    sites = [site((f"{ATTENTION}.{kind}",), bits) for kind, bits in (("k", 0x43E0), ("v", 0x4460))]
    if inputs:
        sites += [site((f"{module}.input",), 0x4360) for module in LINEARS]
    path = source.parent / "calibration.safetensors"
    own = open_checkpoint(source).fingerprint if fingerprint is None else fingerprint
    write_calibration(path, Calibration(own, ("blake3:a",), {"max_length": 64}, tuple(sites)))
    return path


@pytest.mark.parametrize("method", [None, "compressed-tensors", "modelopt", "quark"])
def test_calibrated_scales_of_k_and_v_are_added_and_no_weight_is_touched(method: str | None, tmp_path: Path) -> None:
    tensors = others()
    for name, (codes, scales) in quantized("block:128x128").items():
        tensors |= {name: codes, f"{name}_scale_inv": scales}
    quantization = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    source = write_model(tmp_path / "source", tensors, config_of(quantization_config=quantization))
    request = Request(quant_method=method, kv_cache=True, calibration=calibrate(source))
    facts = fp8pack.convert(source, request, WriteOptions(tmp_path / "out"))
    assert facts["num_carried"] == len(LINEARS)
    found = read_tensors(tmp_path / "out")
    k, v, shape = KV_NAMES[method or "fp8"]
    assert (found[k].item(), found[v].item(), found[k].shape) == (1.0, 2.0, shape)
    for name in WEIGHTS:
        assert found[name].tobytes() == tensors[name].tobytes()
    if method is None:
        assert {name: t.tobytes() for name, t in found.items() if name in tensors} == {
            name: t.tobytes() for name, t in tensors.items()
        }


def test_calibrated_scales_of_k_and_v_take_the_place_of_those_in_the_source(tmp_path: Path) -> None:
    extra = {f"{ATTENTION}.{kind}_proj.output_scale": np.full((), 9, np.float32) for kind in "kv"}
    source = source_of(tmp_path / "source", "block:128x128", extra=extra)
    request = Request(quant_method="quark", kv_cache=True, calibration=calibrate(source))
    found = convert(source, tmp_path / "out", request)
    k, v, _ = KV_NAMES["quark"]
    assert (found[k].item(), found[v].item()) == (1.0, 2.0)


def test_scales_of_k_and_v_are_added_beside_the_static_scales_of_the_source(tmp_path: Path) -> None:
    """A calibration that knows nothing of what enters the weights leaves those scales as they are."""
    source = source_of(tmp_path / "source", "tensor", "static")
    before = convert(source, tmp_path / "before", asked(method="modelopt"))
    request = Request(quant_method="modelopt", kv_cache=True, calibration=calibrate(source))
    after = convert(source, tmp_path / "after", request)
    k, v, _ = KV_NAMES["modelopt"]
    assert (after.pop(k).item(), after.pop(v).item()) == (1.0, 2.0)
    assert {name: t.tobytes() for name, t in after.items()} == {name: t.tobytes() for name, t in before.items()}


@pytest.mark.parametrize("granularity", ["block:128x128", "channel", "tensor"])
def test_dynamic_activations_become_static_by_a_calibration_as_in_a_pack(granularity: str, tmp_path: Path) -> None:
    source = source_of(tmp_path / "source", granularity)
    fp8pack.unpack(source, "float32", WriteOptions(tmp_path / "floats"))
    request = Request(scheme="FP8", kv_cache=True, calibration=calibrate(source, "", inputs=True))
    found = convert(source, tmp_path / "out", request)
    assert {found[f"{module}.input_scale"].item() for module in LINEARS} == {0.5}
    if granularity != "tensor":  # whose scales are carried, each its own
        fp8pack.pack(tmp_path / "floats", request, WriteOptions(tmp_path / "expected"))
        assert as_bytes(tmp_path / "out") == as_bytes(tmp_path / "expected")


# Mixtures.


@pytest.fixture
def mixed(tmp_path: Path) -> Iterator[Path]:
    """Layers in blocks and in channels and in floats, in two shards."""
    tensors = others()
    block, channel = quantized("block:128x128"), quantized("channel")
    for name in WEIGHTS:
        codes, scales = (channel if ".mlp." in name else block)[name]
        tensors |= {name: codes, f"{name}_scale": scales}
    tensors[f"{ATTENTION}.o_proj.weight"] = float_weights()[f"{ATTENTION}.o_proj.weight"]
    del tensors[f"{ATTENTION}.o_proj.weight_scale"]
    weights = {"num_bits": 8, "type": "float"}
    scheme = {"group_0": {"targets": ["Linear"], "weights": weights | {"strategy": "channel"}}}
    scheme["group_1"] = {
        "targets": ["re:.*attn.*"], "weights": weights | {"strategy": "block", "block_structure": [128, 128]},
    }  # fmt: skip
    quantization = {"quant_method": "compressed-tensors", "config_groups": scheme, "ignore": ["lm_head"]}
    yield write_model(tmp_path / "source", tensors, config_of(quantization_config=quantization), shards=2)


def test_a_mixture_becomes_one_granularity_carrying_what_it_can(mixed: Path, tmp_path: Path) -> None:
    facts = fp8pack.convert(mixed, asked("group:64", "fp8pack"), WriteOptions(tmp_path / "out"))
    assert facts["num_carried"] == len(LINEARS) - 1
    facts = fp8pack.convert(mixed, asked("channel", "compressed-tensors"), WriteOptions(tmp_path / "channels"))
    assert (facts["num_carried"], facts["num_packed"]) == (3, 6)
    loaded, unpacked = fp8pack.load_packed(tmp_path / "out"), values_of(quantized("channel"), "channel")
    name = f"{LAYER}.mlp.up_proj.weight"
    np.testing.assert_array_equal(loaded[name].dequantize(torch.float32).numpy(), unpacked[name])


def test_rules_mix_granularities_where_the_convention_holds_them(tmp_path: Path) -> None:
    source = source_of(tmp_path / "source", "tensor")
    rule = Rule(Pattern("*.mlp.*"), RuleAction.PACK, granularity=parse_granularity("channel"))
    found = convert(source, tmp_path / "out", asked("block:128x128", "fp8pack", rules=(rule,)))
    assert found[f"{LAYER}.mlp.up_proj.weight_scale_inv"].shape == (384, 1)
    assert found[f"{ATTENTION}.o_proj.weight_scale_inv"].shape == (2, 2)
    with pytest.raises(RecipeError, match="fp8pack"):
        fp8pack.convert(source, asked("block:128x128", "fp8", rules=(rule,)), WriteOptions(tmp_path / "no"))


# Containers.


def test_pack_overrules_the_policy_for_fp8_weights_too(tmp_path: Path) -> None:
    """`--pack lm_head`, of a head that is FP8 in the source, changes nothing and is no error."""
    codes, scales = oracle.quantize(random_weight((128, 256)).astype(np.float32), "e4m3", "channel")
    extra: Tensors = {"model.head.weight": codes.view(E4M3), "model.head.weight_scale_inv": scales}
    source = source_of(tmp_path / "source", "channel", extra=extra)
    request = asked(method="compressed-tensors", pack=(Pattern("model.head"),))
    found = convert(source, tmp_path / "out", request)
    assert found["model.head.weight"].tobytes() == codes.tobytes()


def test_a_single_file_becomes_a_single_file_with_its_markers(tmp_path: Path) -> None:
    module = "model.diffusion_model.blocks.0.ffn.0"
    codes, scales = oracle.quantize(random_weight((128, 256)).astype(np.float32), "e4m3", "tensor")
    tensors: Tensors = {
        "model.diffusion_model.scaled_fp8": np.zeros(0, E4M3),
        f"{module}.weight": codes.view(E4M3),
        f"{module}.scale_weight": scales.reshape(()),
        f"{module}.bias": random_weight((128,), 1),
    }
    write_shard(tmp_path / "x.safetensors", tensors, {"note": "kept", "_quantization_metadata": "{}"})
    facts = fp8pack.convert(tmp_path / "x.safetensors", Request(quant_method="comfyui"))
    output = Path(facts["output"])
    assert output.parent == tmp_path
    found = read_tensors(output)
    assert set(found) == {f"{module}.{leaf}" for leaf in ("weight", "weight_scale", "comfy_quant", "bias")}
    assert json.loads(found[f"{module}.comfy_quant"].tobytes())["format"] == "float8_e4m3fn"
    assert found[f"{module}.weight"].tobytes() == codes.tobytes()
    raw = output.read_bytes()
    metadata = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    assert metadata["note"] == "kept"
    assert "_quantization_metadata" not in metadata
    back = fp8pack.convert(output, Request(quant_method="comfyui-scaled"), WriteOptions(tmp_path / "y.safetensors"))
    assert as_bytes(Path(back["output"])) == as_bytes(tmp_path / "x.safetensors")


def test_mistrals_own_files_keep_params_json_without_what_no_longer_holds(tmp_path: Path) -> None:
    module = "layers.0.feed_forward.w2"
    codes, scales = oracle.quantize(random_weight((128, 256)).astype(np.float32), "e4m3", "tensor")
    tensors: Tensors = {
        f"{module}.weight": codes.view(E4M3),
        f"{module}.qscale_weight": scales.reshape(()),
        f"{module}.qscale_act": np.ones((), np.float32),
    }
    source = write_model(tmp_path / "source", tensors)
    (source / "model.safetensors").rename(source / "consolidated.safetensors")
    params = {"dim": 128, "quantization": {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"}}
    (source / "params.json").write_text(json.dumps(params))
    fp8pack.unpack(source, options=WriteOptions(tmp_path / "floats"))
    assert json.loads((tmp_path / "floats" / "params.json").read_text()) == {"dim": 128}
    assert set(read_tensors(tmp_path / "floats")) == {f"{module}.weight"}
    try:
        fp8pack.convert(source, Request(quant_method="compressed-tensors"), WriteOptions(tmp_path / "out"))
    except Fp8PackError as error:
        assert len(str(error).splitlines()) == 1
    else:  # something must say how the output is quantized
        assert read_contents(open_checkpoint(tmp_path / "out")).method == "compressed-tensors"


def test_files_of_other_tools_do_not_contradict_the_output(tmp_path: Path) -> None:
    source = source_of(tmp_path / "source", "tensor", "static")
    text = config_text(source)
    del text["quantization_config"]
    text["text_config"] = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}}
    (source / "config.json").write_text(json.dumps(text))
    (source / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    convert(source, tmp_path / "out", asked(method="compressed-tensors"))
    found = config_text(tmp_path / "out")
    assert found["quantization_config"]["quant_method"] == "compressed-tensors"
    assert found["text_config"] == {}
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()
    convert(source, tmp_path / "modelopt", asked(method="modelopt"))
    document = json.loads((tmp_path / "modelopt" / "hf_quant_config.json").read_text())
    config = config_text(tmp_path / "modelopt")["quantization_config"]
    assert document["quantization"]["quant_algo"] == config["quant_algo"] == "FP8"
    assert document["quantization"]["exclude_modules"] == config["ignore"]


def test_the_same_again_is_complete_and_a_limit_on_shards_changes_no_tensor(tmp_path: Path) -> None:
    source = source_of(tmp_path / "source", "channel", shards=2)
    request = asked(method="compressed-tensors")
    first = fp8pack.convert(source, request, WriteOptions(tmp_path / "out"))
    again = fp8pack.convert(source, request, WriteOptions(tmp_path / "out"))
    assert again["already_complete"]
    assert again["root"] == first["root"]
    convert(source, tmp_path / "small", request, max_shard_nbytes=60_000)
    assert len(list((tmp_path / "small").glob("*.safetensors"))) > 3
    assert as_bytes(tmp_path / "small") == as_bytes(tmp_path / "out")


# Interrupted.


@pytest.mark.parametrize(("granularity", "method"), [("channel", "compressed-tensors"), ("block:128x128", "fp8")])
def test_a_conversion_that_was_cut_off_continues_to_the_same_bytes(
    granularity: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes that are carried, and bytes that are made anew."""
    source, request = source_of(tmp_path / "source", "channel", shards=2), asked(granularity, method)
    convert(source, tmp_path / "whole", request)
    monkeypatch.setattr(execute, "CHECKPOINT_NBYTES", 1)
    left = iter(range(5))
    with monkeypatch.context() as patched:
        for name in ("carry", "pack"):
            genuine = getattr(bands.BandWorker, name)

            def cut_off(*arguments: Any, genuine: Any = genuine) -> Any:
                if next(left, None) is None:
                    raise KeyboardInterrupt
                return genuine(*arguments)

            patched.setattr(bands.BandWorker, name, cut_off)
        with pytest.raises(KeyboardInterrupt):
            fp8pack.convert(source, request, WriteOptions(tmp_path / "out", workers=1))
    assert not (tmp_path / "out").exists()
    other = asked("group:64", "fp8pack")
    with pytest.raises(OutputError, match="another recipe"):
        fp8pack.convert(source, other, WriteOptions(tmp_path / "out"))
    facts = fp8pack.convert(source, request, WriteOptions(tmp_path / "out"))
    assert facts["resumed_nbytes"] > 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()
    }


MEASURED = """
import json, resource, sys
from pathlib import Path
import fp8pack
out, small, large = map(Path, sys.argv[1:])
asked = fp8pack.Request(scheme="FP8_DYNAMIC"), fp8pack.Request(quant_method="compressed-tensors")
peaks = []
for source in (small, large):
    for i, request in enumerate(asked):
        options = fp8pack.WriteOptions(out / f"{source.name}-{i}", workers=2)
        fp8pack.convert(source, request, options)
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
print(json.dumps(peaks))
"""


def test_memory_does_not_grow_with_the_tensor(tmp_path: Path) -> None:
    """96 MiB of FP8, carried and quantized anew."""
    small = source_of(tmp_path / "small", "block:128x128")
    name = f"{LAYER}.mlp.down_proj.weight"
    tensors: Tensors = {
        name: np.full((12288, 8192), 0x38, np.uint8).view(E4M3),
        f"{name}_scale_inv": np.full((96, 64), 0.5, np.float32),
    }
    quantization = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    large = write_model(tmp_path / "large", tensors, config_of(quantization_config=quantization))
    ran = subprocess.run(
        [sys.executable, "-c", MEASURED, str(tmp_path), str(small), str(large)],
        capture_output=True, text=True, check=False, env=os.environ | {"MALLOC_ARENA_MAX": "2"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    before, after = json.loads(ran.stdout)
    assert after - before < 96 << 20


# Refusals.


@pytest.mark.parametrize(
    ("granularity", "activations", "request_", "able"),
    [
        (
            "block:128x128",
            "dynamic",
            {"method": "mxfp8"},
            ["fp8", "compressed-tensors", "modelopt", "quark", "fp8pack"],
        ),
        ("channel", "dynamic", {"method": "fp8"}, ["compressed-tensors", "modelopt", "quark", "fp8pack"]),
        ("tensor", "static", {"method": "mxfp8"}, ["fp8", "compressed-tensors", "modelopt", "quark", "comfyui"]),
        ("tensor", "dynamic", {"method": "modelopt"}, ["fp8", "compressed-tensors", "quark", "comfyui", "fp8pack"]),
        ("tensor", "dynamic", {"granularity": "group:48", "method": "quark"}, ["compressed-tensors", "fp8pack"]),
        ("channel", "dynamic", {"method": "comfyui", "format": parse_format("e5m2")}, ["fp8pack"]),
    ],
    ids=str,
)
def test_what_a_convention_cannot_hold_is_refused_with_those_that_can(
    granularity: str, activations: str, request_: dict[str, Any], able: list[str], tmp_path: Path
) -> None:
    source = source_of(tmp_path / "source", granularity, activations)
    with pytest.raises(RecipeError) as caught:
        fp8pack.convert(source, asked(**request_), WriteOptions(tmp_path / "out"))
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    offered = message.partition("--quant-method ")[2].split(" or ")
    assert set(able) <= set(offered), message
    assert request_["method"] not in offered
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_a_conversion_to_nothing_is_refused(tmp_path: Path) -> None:
    source = source_of(tmp_path / "source", "channel")
    with pytest.raises(RecipeError, match="nothing to convert to"):
        fp8pack.convert(source, Request(), WriteOptions(tmp_path / "out"))


def test_a_convention_that_is_not_known_is_refused_with_all_that_are(tmp_path: Path) -> None:
    source = source_of(tmp_path / "source", "channel")
    with pytest.raises(RecipeError) as caught:
        fp8pack.convert(source, asked(method="awq"), WriteOptions(tmp_path / "out"))
    assert all(method.name in str(caught.value) for method in METHODS)


def test_floats_alone_are_refused_with_the_way_out(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", float_weights() | others(), config_of())
    with pytest.raises(InputError, match="fp8pack pack"):
        fp8pack.convert(source, asked(method="fp8", granularity="block:128x128"), WriteOptions(tmp_path / "out"))


def test_the_commands_print_the_output_alone_and_an_error_is_one_line(tmp_path: Path) -> None:
    source = source_of(tmp_path / "source", "channel")
    for command, flags in (("convert", ["--quant-method", "compressed_tensors"]), ("unpack", ["--dtype", "float16"])):
        ran = CliRunner().invoke(app, [command, str(source), "-o", str(tmp_path / command), "-q", *flags])
        assert ran.exit_code == 0, ran.output
        assert ran.stdout == f"{tmp_path / command}\n"
        ran = CliRunner().invoke(app, [command, str(source), "-o", str(tmp_path / command), "-q", *flags, "--json"])
        assert json.loads(ran.stdout)["already_complete"]
        fp8pack.inspect(tmp_path / command)
    ran = CliRunner().invoke(app, ["convert", str(source), "--quant-method", "mxfp8"])
    assert isinstance(ran.exception, RecipeError)
    assert ran.stdout == ""


@pytest.mark.parametrize("name", ["comfyui", "comfyui-scaled", "torchao"])
def test_a_name_that_is_taken_already_is_refused(name: str, tmp_path: Path) -> None:
    """A tensor of the source would be written twice under one name."""
    leaf = {"comfyui": "comfy_quantity", "comfyui-scaled": "scale_weights", "torchao": "_weight_scales"}[name]
    extra = {f"{LAYER}.mlp.up_proj.{leaf}": random_weight((4,))}
    source = source_of(tmp_path / "source", "tensor", extra=extra)
    found = convert(source, tmp_path / "out", asked(method=name))
    assert f"{LAYER}.mlp.up_proj.{leaf}" in found
    taken = {"comfyui": "weight_scale", "comfyui-scaled": "scale_weight", "torchao": "_weight_scale"}[name]
    extra = {f"{LAYER}.mlp.up_proj.{taken}": random_weight((4, 4))}
    source = source_of(tmp_path / "other", "tensor", extra=extra)
    with pytest.raises(InputError) as caught:
        fp8pack.convert(source, asked(method=name), WriteOptions(tmp_path / "no"))
    assert taken in str(caught.value)


# The dtype that weights had before.


@pytest.mark.parametrize(("dtype", "name"), [(np.float16, "float16"), (np.float32, "float32"), (BF16, "bfloat16")])
def test_the_dtype_before_packing_outlives_conversions(dtype: Any, name: str, tmp_path: Path) -> None:
    """Whether the bytes are carried or made anew; config.json of the source says another."""
    weights = {weight: random_weight(LINEARS[weight.removesuffix(".weight")], 3, dtype) for weight in WEIGHTS}
    source = write_model(tmp_path / "model", weights, config_of())
    fp8pack.pack(source, Request(scheme="FP8_BLOCK"), WriteOptions(tmp_path / "block"))
    fp8pack.convert(tmp_path / "block", Request(scheme="FP8_DYNAMIC"), WriteOptions(tmp_path / "dynamic"))
    kept = Request(quant_method="fp8pack", rules=(Rule(Pattern(WEIGHTS[0]), RuleAction.KEEP),))
    fp8pack.convert(tmp_path / "dynamic", kept, WriteOptions(tmp_path / "carried"))
    for folder in ("dynamic", "carried"):
        packed = fp8pack.load_packed(tmp_path / folder)
        assert packed[WEIGHTS[1]].dequantize().dtype == getattr(torch, name)
    assert read_tensors(tmp_path / "carried")[WEIGHTS[0]].dtype == dtype
    fp8pack.unpack(tmp_path / "carried", options=WriteOptions(tmp_path / "floats"))
    assert {tensor.dtype for tensor in read_tensors(tmp_path / "floats").values()} == {np.dtype(dtype)}
    assert json.loads((tmp_path / "floats" / "config.json").read_text())["dtype"] == name


@pytest.mark.parametrize(
    ("declared", "dtype"),
    [
        ({"dtype": "float16"}, "F16"),
        ({"dtype": None, "torch_dtype": "torch.float32"}, "F32"),
        ({"dtype": None, "text_config": {"torch_dtype": "float16"}}, "F16"),
        ({"dtype": "float8_e4m3fn"}, "BF16"),
        ({"dtype": 7}, "BF16"),
        ({"dtype": None}, "BF16"),
    ],
)
def test_of_a_foreign_checkpoint_it_is_what_its_configuration_declares(
    declared: dict[str, Any], dtype: str, tmp_path: Path
) -> None:
    fp8pack.pack(write_model(tmp_path / "model", float_weights(), config_of()), Request(), WriteOptions(tmp_path / "p"))
    (tmp_path / "p" / "fp8pack.json").unlink()
    config = json.loads((tmp_path / "p" / "config.json").read_text()) | declared
    (tmp_path / "p" / "config.json").write_text(json.dumps(config))
    contents = read_contents(open_checkpoint(tmp_path / "p"))
    assert {entry.source_dtype for entry in contents.quantized.values()} == {dtype}
    assert contents.source_dtype == dtype
