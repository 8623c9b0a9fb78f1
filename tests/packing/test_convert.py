"""From one FP8 convention to another: bytes that are carried stay, everything else is dequantized and packed anew."""

import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import oracle
import pytest
import torch
import verbs
from checkpoints import MakeCheckpoint, random_weight, read_tensors, write_model, write_shard
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from packing.fp8_sources import (
    ATTENTION,
    BF16,
    E4M3,
    LAYER,
    LINEARS,
    WEIGHTS,
    as_bytes,
    asked,
    config_of,
    config_text,
    convert,
    float_weights,
    others,
    quantized,
    request_for,
    source_of,
)

import fp8pack
from fp8pack.checkpoint.quant_methods import METHODS
from fp8pack.checkpoint.quantized import read_contents
from fp8pack.checkpoint.source import open_checkpoint
from fp8pack.errors import InputError, RecipeError
from fp8pack.modelfacts.patterns import Pattern
from fp8pack.numerics.formats import parse_format
from fp8pack.numerics.granularity import parse_granularity
from fp8pack.numerics.rounding import ScaleRounding
from fp8pack.packing.options import WriteOptions
from fp8pack.planning.recipe import Request, Rule, RuleAction
from fp8pack.planning.sizes import Sizes


def values_of(
    packed: dict[str, tuple[NDArray[Any], NDArray[np.float32]]], granularity: str
) -> dict[str, NDArray[np.float32]]:
    return {
        name: codes.astype(np.float32)
        * oracle.spread(scales, oracle.region_of(granularity, codes.shape), (codes.shape[0], codes.shape[1]))
        for name, (codes, scales) in packed.items()
    }


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


def as_convention(source: Path, folder: Path, spelling: str) -> Path | None:
    """The checkpoint in a convention, None where that cannot express it."""
    folder.mkdir(parents=True, exist_ok=True)
    output = folder / spelling
    try:
        facts = verbs.convert(source, request_for(spelling), WriteOptions(output))
    except RecipeError:
        return None
    assert facts.num_carried == len(LINEARS), (spelling, facts.num_carried)
    return output


def sorted_lists(value: Any) -> Any:
    """The value with the names in its lists in one order."""
    if isinstance(value, dict):
        return {key: sorted_lists(inner) for key, inner in value.items()}
    return sorted(value) if isinstance(value, list) and all(isinstance(item, str) for item in value) else value


@pytest.mark.slow
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


@pytest.mark.slow
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
    facts = verbs.convert(source, asked(fine, method), WriteOptions(tmp_path / "out"))
    assert facts.num_carried == len(LINEARS)
    loaded, packed = fp8pack.load_packed(tmp_path / "out"), quantized(coarse, rounding)
    for name, values in values_of(packed, coarse).items():
        assert loaded[name].granularity == fine
        assert loaded[name].qdata.view(torch.uint8).numpy().tobytes() == packed[name][0].tobytes()
        np.testing.assert_array_equal(loaded[name].dequantize(torch.float32).numpy(), values)


@pytest.mark.slow
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
        facts = verbs.convert(source, request, WriteOptions(Path(folder) / "out"))
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
        assert facts.num_carried == int(carried)
        if not carried:
            codes, scales = oracle.quantize(values, "e4m3", ours, "up" if ours == "mx" else rounding)
            spread = oracle.spread(scales, oracle.region_of(ours, shape), shape)
            values = codes.view(E4M3).astype(np.float32) * spread
        np.testing.assert_array_equal(found, values)


def test_a_block_that_reaches_over_a_weights_edge_covers_its_rows_and_columns(tmp_path: Path) -> None:
    """96 columns lie within one block of 128, though 128 is not a multiple of 96."""
    shapes = {f"{LAYER}.mlp.down_proj": (64, 96), f"{ATTENTION}.o_proj": (80, 48)}
    source = source_of(tmp_path / "source", "block:128x128", shapes=shapes)
    for granularity in ("channel", "tensor", "group:32", "block:128x128"):
        facts = verbs.convert(source, asked(granularity, "fp8pack"), WriteOptions(tmp_path / granularity))
        loaded = fp8pack.load_packed(tmp_path / granularity)
        for name, values in values_of(quantized("block:128x128", shapes=shapes), "block:128x128").items():
            np.testing.assert_array_equal(loaded[name].dequantize(torch.float32).numpy(), values)
        assert facts.num_carried == len(shapes), granularity


@pytest.mark.slow
def test_bytes_are_carried_in_bands_strips_and_columns(tmp_path: Path) -> None:
    shapes = {f"{LAYER}.mlp.down_proj": (200, 1000), f"{ATTENTION}.o_proj": (128, 256)}
    source = source_of(tmp_path / "source", "block:128x128", rounding="up", shapes=shapes)
    rows, columns = Sizes(band=1000, strip=300), Sizes(band=1000, granule=500, strip=300)
    for granularity in ("block:64x32", "group:64", "mx"):
        convert(source, tmp_path / f"rows-{granularity}", asked(granularity, "fp8pack"), workers=3, sizes=rows)
        convert(source, tmp_path / f"columns-{granularity}", asked(granularity, "fp8pack"), sizes=columns)
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
        verbs.convert(source, asked("mx", "mxfp8"), WriteOptions(tmp_path / "out"))


def test_a_scale_of_zero_is_refused_with_the_way_out(tmp_path: Path) -> None:
    source = source_of(tmp_path / "source", "channel")
    tensors = read_tensors(source)
    name = f"{WEIGHTS[0]}_scale_inv"
    scales = tensors[name].copy()
    scales[3] = 0
    write_shard(source / "model.safetensors", tensors | {name: scales})
    with pytest.raises(InputError) as caught:
        verbs.convert(source, asked(method="compressed-tensors"), WriteOptions(tmp_path / "out"))
    assert name in str(caught.value)
    assert "fp8pack unpack" in caught.value.hint
    fp8pack.unpack(source, tmp_path / "floats")
    verbs.pack(tmp_path / "floats", asked(method="compressed-tensors"), WriteOptions(tmp_path / "b"))


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
    fp8pack.unpack(source, tmp_path / "floats", dtype="float32")
    request = asked(ours, method, format=parse_format("e4m3"))
    facts = verbs.convert(source, request, WriteOptions(tmp_path / "out", workers=2))
    assert facts.num_carried == 0
    assert facts.num_packed == len(LINEARS)
    verbs.pack(tmp_path / "floats", request, WriteOptions(tmp_path / "expected"))
    assert as_bytes(tmp_path / "out") == as_bytes(tmp_path / "expected")
    dtype = {"dtype": "bfloat16"}  # of the floats in between, which do not say so
    assert sorted_lists(config_text(tmp_path / "out")) == sorted_lists(config_text(tmp_path / "expected")) | dtype


def test_what_is_quantized_anew_is_the_same_in_bands_strips_and_on_torch(tmp_path: Path) -> None:
    shapes = {f"{LAYER}.mlp.down_proj": (200, 1000), f"{ATTENTION}.o_proj": (128, 256)}
    source = source_of(tmp_path / "source", "block:48x80", shapes=shapes, shards=2)
    requests = {name: asked(name, "fp8pack") for name in ("tensor", "channel", "block:128x128", "mx")}
    for name, request in requests.items():
        convert(source, tmp_path / f"{name}-whole", request, workers=1)
        convert(source, tmp_path / f"{name}-torch", request, device="torch:cpu")
        convert(source, tmp_path / f"{name}-cut", request, max_memory=1, sizes=Sizes(band=3000, strip=2000))
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
    facts = verbs.convert(source, asked(method="compressed-tensors"), WriteOptions(tmp_path / "out"))
    assert facts.num_carried == facts.num_packed == len(shapes)
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
            verbs.convert(source, request, WriteOptions(tmp_path / f"{i}"))
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
        verbs.convert(source, request, WriteOptions(tmp_path / "out"))
    assert bad in str(caught.value)
    assert "--ignore" not in caught.value.command_line


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
    facts = verbs.convert(source, asked("block:128x128", "fp8"), WriteOptions(tmp_path / "out"))
    found, values = read_tensors(tmp_path / "out"), values_of(quantized("channel", shapes=shapes), "channel")
    kept = [f"{LAYER}.mlp.down_proj.weight", *(f"{ATTENTION}.{kind}_proj.weight" for kind in "qkv")]
    for name in kept:
        assert found[name].tobytes() == values[name].astype(BF16).tobytes(), name
    reasons = {entry.name: entry.reason for entry in facts.kept}
    assert "multiple of 128" in reasons[f"{LAYER}.mlp.down_proj.weight"]
    assert "ignored with v_proj" in reasons[f"{ATTENTION}.q_proj.weight"]
    assert facts.num_unpacked == len(kept)


def test_a_float_weight_of_the_source_is_never_made_fp8(tmp_path: Path) -> None:
    name = f"{LAYER}.mlp.extra_proj.weight"
    source = source_of(tmp_path / "source", "channel", extra={name: random_weight((128, 128), 9)})
    found = convert(source, tmp_path / "out", asked("block:128x128", "fp8"))
    assert found[name].tobytes() == random_weight((128, 128), 9).tobytes()
    assert (
        name.removesuffix(".weight") in config_text(tmp_path / "out")["quantization_config"]["modules_to_not_convert"]
    )


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
    facts = verbs.convert(mixed, asked("group:64", "fp8pack"), WriteOptions(tmp_path / "out"))
    assert facts.num_carried == len(LINEARS) - 1
    facts = verbs.convert(mixed, asked("channel", "compressed-tensors"), WriteOptions(tmp_path / "channels"))
    assert (facts.num_carried, facts.num_packed) == (3, 6)
    loaded, unpacked = fp8pack.load_packed(tmp_path / "out"), values_of(quantized("channel"), "channel")
    name = f"{LAYER}.mlp.up_proj.weight"
    np.testing.assert_array_equal(loaded[name].dequantize(torch.float32).numpy(), unpacked[name])


def test_rules_mix_granularities_where_the_convention_holds_them(tmp_path: Path) -> None:
    source = source_of(tmp_path / "source", "tensor")
    rule = Rule(Pattern("*.mlp.*"), RuleAction.PACK, granularity=parse_granularity("channel"))
    found = convert(source, tmp_path / "out", asked("block:128x128", "fp8pack", rules=(rule,)))
    assert found[f"{LAYER}.mlp.up_proj.weight_scale_inv"].shape == (384, 1)
    assert found[f"{ATTENTION}.o_proj.weight_scale_inv"].shape == (2, 2)
    with pytest.raises(RecipeError, match="one format and granularity"):
        verbs.convert(source, asked("block:128x128", "fp8", rules=(rule,)), WriteOptions(tmp_path / "no"))


# The dtype that weights had before.


@pytest.mark.parametrize(("dtype", "name"), [(np.float16, "float16"), (np.float32, "float32"), (BF16, "bfloat16")])
def test_the_dtype_before_packing_outlives_conversions(dtype: Any, name: str, tmp_path: Path) -> None:
    """Whether the bytes are carried or made anew; config.json of the source says another."""
    weights = {weight: random_weight(LINEARS[weight.removesuffix(".weight")], 3, dtype) for weight in WEIGHTS}
    source = write_model(tmp_path / "model", weights, config_of())
    fp8pack.pack(source, tmp_path / "block", scheme="FP8_BLOCK")
    fp8pack.convert(tmp_path / "block", tmp_path / "dynamic", scheme="FP8_DYNAMIC")
    kept = Request(quant_method="fp8pack", rules=(Rule(Pattern(WEIGHTS[0]), RuleAction.KEEP),))
    verbs.convert(tmp_path / "dynamic", kept, WriteOptions(tmp_path / "carried"))
    for folder in ("dynamic", "carried"):
        packed = fp8pack.load_packed(tmp_path / folder)
        assert packed[WEIGHTS[1]].dequantize().dtype == getattr(torch, name)
    assert read_tensors(tmp_path / "carried")[WEIGHTS[0]].dtype == dtype
    fp8pack.unpack(tmp_path / "carried", tmp_path / "floats")
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
    fp8pack.pack(write_model(tmp_path / "model", float_weights(), config_of()), tmp_path / "p")
    (tmp_path / "p" / "fp8pack.json").unlink()
    config = json.loads((tmp_path / "p" / "config.json").read_text()) | declared
    (tmp_path / "p" / "config.json").write_text(json.dumps(config))
    contents = read_contents(open_checkpoint(tmp_path / "p"))
    assert {entry.source_dtype for entry in contents.quantized.values()} == {dtype}
    assert contents.source_dtype == dtype


# One part of the recipe alone.


CT = "compressed-tensors"


@pytest.mark.parametrize(
    ("made", "asked_for", "method"),
    [
        (
            {"quant_method": CT, "granularity": "channel"},
            {"granularity": "tensor"},
            "compressed-tensors",
        ),
        ({"quant_method": CT, "granularity": "channel"}, {"granularity": "mx"}, CT),
        ({"quant_method": "modelopt", "granularity": "block:128x128"}, {"granularity": "mx"}, "modelopt"),
        ({"quant_method": "modelopt", "granularity": "block:128x128"}, {"granularity": "channel"}, "modelopt"),
        ({"quant_method": "quark", "granularity": "tensor"}, {"granularity": "channel"}, "quark"),
        ({"quant_method": "torchao", "granularity": "channel"}, {"granularity": "tensor"}, "torchao"),
        ({"quant_method": "comfyui", "granularity": "tensor"}, {"format": "e5m2"}, "comfyui"),
        ({"quant_method": "fp8pack", "granularity": "channel"}, {"format": "e5m2"}, "fp8pack"),
        ({"quant_method": "fp8", "granularity": "block:128x128"}, {"granularity": "tensor"}, "fp8"),
        # what the source's method cannot store goes to one that can
        ({"quant_method": "fp8", "granularity": "block:128x128"}, {"granularity": "channel"}, CT),
        ({"quant_method": CT, "granularity": "channel"}, {"format": "e5m2"}, "fp8pack"),
    ],
    ids=str,
)
def test_the_quant_method_of_the_source_stays_where_it_can(
    made: dict[str, str], asked_for: dict[str, str], method: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    fp8pack.pack(make_checkpoint(), tmp_path / "a", **made)
    assert fp8pack.convert(tmp_path / "a", dry_run=True, **asked_for).recipe["quant_method"] == method
