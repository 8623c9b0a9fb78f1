"""Fused 3-D experts, BF16 and FP8: taken apart as if the checkpoint had held one tensor for each expert."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import oracle
import pytest
import verbs
from checkpoints import Tensors, llama_config, random_weight, read_tensors, write_model
from numpy.typing import NDArray

import fp8pack
from fp8pack.errors import InputError
from fp8pack.modelfacts.patterns import Pattern
from fp8pack.numerics.granularity import parse_granularity
from fp8pack.packing.options import WriteOptions
from fp8pack.planning.recipe import Request
from fp8pack.planning.sizes import Sizes

E4M3, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16
EXPERTS = "model.layers.0.mlp.experts"
BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}
COUNT, HIDDEN, INNER = 3, 384, 128
LAYOUTS = ("rows", "columns", "interleaved")
MODEL_TYPES = {"rows": "qwen3_5_moe", "columns": "llama4_text", "interleaved": "gpt_oss"}


def single_experts(hidden: int = HIDDEN, inner: int = INNER, biases: bool = False) -> Tensors:
    """One tensor for each expert."""
    tensors: Tensors = {}
    for i in range(COUNT):
        for j, (leaf, shape) in enumerate(
            {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}.items()
        ):
            tensors[f"{EXPERTS}.{i}.{leaf}.weight"] = random_weight(shape, 10 * i + j)
            if biases:
                tensors[f"{EXPERTS}.{i}.{leaf}.bias"] = random_weight(shape[:1], 10 * i + j + 5)
    return tensors


def stack(tensors: Tensors, leaf: str, kind: str) -> NDArray[Any]:
    return np.stack([tensors[f"{EXPERTS}.{i}.{leaf}.{kind}"] for i in range(COUNT)])


def fuse(tensors: Tensors, layout: str) -> Tensors:
    """The same experts as a model class of that layout stores them."""
    fused: Tensors = {}
    for kind in ("weight", "bias"):
        if f"{EXPERTS}.0.down_proj.{kind}" not in tensors:
            continue
        gate, up, down = (stack(tensors, leaf, kind) for leaf in ("gate_proj", "up_proj", "down_proj"))
        both = np.concatenate([gate, up], 1)
        if layout == "interleaved":
            both = np.stack([gate, up], 2).reshape(both.shape)
        if layout != "rows" and kind == "weight":
            both, down = both.transpose(0, 2, 1), down.transpose(0, 2, 1)
        suffix = "_bias" if kind == "bias" else ""
        fused[f"{EXPERTS}.gate_up_proj{suffix}"] = np.ascontiguousarray(both)
        fused[f"{EXPERTS}.down_proj{suffix}"] = np.ascontiguousarray(down)
    return fused


def rest(hidden: int = HIDDEN) -> Tensors:
    return {
        "model.layers.0.self_attn.o_proj.weight": random_weight((hidden, hidden), 90),
        "model.layers.0.mlp.router.weight": random_weight((COUNT, hidden), 91),
        "model.norm.weight": random_weight((hidden,), 92),
    }


def config_of(layout: str, hidden: int = HIDDEN, **more: Any) -> dict[str, Any]:
    return llama_config("SomeMoeForCausalLM", 1) | {
        "model_type": MODEL_TYPES.get(layout, layout),
        "hidden_size": hidden,
        **more,
    }


def as_bytes(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {name: (str(t.dtype), t.shape, t.tobytes()) for name, t in read_tensors(folder).items()}


def asked(granularity: str, method: str | None = None, **changes: Any) -> Request:
    return Request(granularity=parse_granularity(granularity), quant_method=method, **changes)


@pytest.mark.parametrize("granularity", ["tensor", "channel", "block:128x128", "mx", "group:64"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fused_experts_are_packed_as_single_ones_are(layout: str, granularity: str, tmp_path: Path) -> None:
    tensors = single_experts(biases=layout == "interleaved")
    fused = write_model(tmp_path / "fused", fuse(tensors, layout) | rest(), config_of(layout))
    single = write_model(tmp_path / "single", tensors | rest(), config_of(layout))
    for name, source in (("out", fused), ("expected", single)):
        verbs.pack(source, asked(granularity), WriteOptions(tmp_path / name))
    found, expected = as_bytes(tmp_path / "out"), as_bytes(tmp_path / "expected")
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "expected")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bands_strips_workers_and_shards_change_no_byte_of_them(layout: str, tmp_path: Path) -> None:
    tensors = single_experts(biases=layout == "interleaved")
    source = write_model(tmp_path / "fused", fuse(tensors, layout) | rest(), config_of(layout), shards=2)
    verbs.pack(source, asked("block:128x128"), WriteOptions(tmp_path / "whole", workers=1))
    verbs.pack(source, asked("block:128x128"), WriteOptions(tmp_path / "many", workers=4, max_shard_size=60_000))
    verbs.pack(source, asked("block:128x128"), WriteOptions(tmp_path / "torch", device="torch:cpu"))
    verbs.pack(source, asked("block:128x128"), WriteOptions(tmp_path / "cut", sizes=Sizes(band=3000, strip=1000)))
    for name in ("many", "torch", "cut"):
        assert as_bytes(tmp_path / name) == as_bytes(tmp_path / "whole"), name


@pytest.mark.parametrize(("hidden", "inner"), [(128, 128), (256, 128)], ids=["H = I", "H = 2I"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_models_type_decides_where_shapes_are_square(layout: str, hidden: int, inner: int, tmp_path: Path) -> None:
    tensors = single_experts(hidden, inner)
    fused = write_model(tmp_path / "fused", fuse(tensors, layout) | rest(hidden), config_of(layout, hidden))
    single = write_model(tmp_path / "single", tensors | rest(hidden), config_of(layout, hidden))
    for name, source in (("out", fused), ("expected", single)):
        verbs.pack(source, asked("block:128x128"), WriteOptions(tmp_path / name))
    assert as_bytes(tmp_path / "out") == as_bytes(tmp_path / "expected")


def test_the_hidden_size_of_a_text_config_and_a_wrappers_prefix_will_do(tmp_path: Path) -> None:
    tensors = fuse(single_experts(), "columns")
    renamed = {name.replace("model.", "model.language_model."): tensor for name, tensor in tensors.items()}
    config = {
        "architectures": ["Qwen3VLMoeForConditionalGeneration"],
        "model_type": "qwen3_vl_moe",
        "text_config": config_of("qwen3_vl_moe_text"),
    }
    source = write_model(tmp_path / "model", renamed | rest(), config)
    verbs.pack(source, asked("channel"), WriteOptions(tmp_path / "out"))
    found = read_tensors(tmp_path / "out")
    weight = single_experts()[f"{EXPERTS}.1.up_proj.weight"].astype(np.float32)
    payload, _ = oracle.quantize(weight, "e4m3", "channel")
    name = f"{EXPERTS}.1.up_proj.weight".replace("model.", "model.language_model.")
    assert found[name].tobytes() == payload.tobytes()


def test_experts_whose_layout_nothing_tells_stay_as_they_are(tmp_path: Path) -> None:
    tensors = fuse(single_experts(), "rows")
    config = config_of("some_moe")
    del config["hidden_size"]
    source = write_model(tmp_path / "model", tensors | rest(), config)
    verbs.pack(source, asked("channel"), WriteOptions(tmp_path / "out"))
    found = read_tensors(tmp_path / "out")
    for name, tensor in tensors.items():
        assert found[name].tobytes() == tensor.tobytes()
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert EXPERTS in ignored


# What is ignored.


@pytest.mark.parametrize(
    "pattern", [f"{EXPERTS}.gate_up_proj", "*experts*", f"{EXPERTS}.*", r"re:.*experts\.", f"{EXPERTS}.1.up_proj"]
)
def test_experts_are_kept_whole_by_the_fused_name_and_by_that_of_one(pattern: str, tmp_path: Path) -> None:
    """Engines take a layer's experts alike, so one that stays keeps all; and what stays is fused as it was."""
    tensors = fuse(single_experts(biases=True), "interleaved")
    source = write_model(tmp_path / "model", tensors | rest(), config_of("interleaved"))
    ignore = (Pattern(pattern),)
    verbs.pack(source, asked("block:128x128", ignore=ignore), WriteOptions(tmp_path / "out"))
    found = read_tensors(tmp_path / "out")
    assert {name for name in found if "experts" in name} == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].tobytes() == tensor.tobytes(), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert EXPERTS in config["modules_to_not_convert"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_our_own_convention_keeps_one_expert_alone(layout: str, tmp_path: Path) -> None:
    tensors = single_experts()
    source = write_model(tmp_path / "model", fuse(tensors, layout) | rest(), config_of(layout))
    kept = f"{EXPERTS}.1.up_proj.weight"
    request = asked("channel", "fp8pack", ignore=(Pattern(kept),))
    verbs.pack(source, request, WriteOptions(tmp_path / "out"))
    found = read_tensors(tmp_path / "out")
    assert found[kept].tobytes() == tensors[kept].tobytes()
    for name, weight in tensors.items():
        if name != kept:
            payload, _ = oracle.quantize(weight.astype(np.float32), "e4m3", "channel")
            assert found[name].tobytes() == payload.tobytes(), name
    assert not any(name.endswith("experts.gate_up_proj") for name in found)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_that_no_engine_takes_in_blocks_stay_fused(layout: str, tmp_path: Path) -> None:
    tensors = fuse(single_experts(384, 96), layout)
    source = write_model(tmp_path / "model", tensors | rest(), config_of(layout))
    verbs.pack(source, asked("block:128x128", "fp8"), WriteOptions(tmp_path / "out"))
    found = read_tensors(tmp_path / "out")
    for name, tensor in tensors.items():
        assert found[name].tobytes() == tensor.tobytes(), name
    assert "model.layers.0.self_attn.o_proj.weight_scale_inv" in found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_nan_in_an_expert_names_it_and_the_flag_that_mends_it(layout: str, tmp_path: Path) -> None:
    tensors = single_experts()
    bad = f"{EXPERTS}.2.gate_proj.weight"
    tensors[bad][5, 7] = np.nan
    source = write_model(tmp_path / "model", fuse(tensors, layout) | rest(), config_of(layout))
    with pytest.raises(InputError) as caught:
        verbs.pack(source, asked("channel"), WriteOptions(tmp_path / "out"))
    assert f"--ignore {bad}" in caught.value.command_line
    verbs.pack(source, asked("channel", ignore=(Pattern(bad),)), WriteOptions(tmp_path / "out"))
    assert f"{EXPERTS}.gate_up_proj" in read_tensors(tmp_path / "out")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_experts_are_held_against_their_fused_source(layout: str, tmp_path: Path) -> None:
    source = write_model(tmp_path / "model", fuse(single_experts(), layout) | rest(), config_of(layout))
    verbs.pack(source, asked("channel"), WriteOptions(tmp_path / "out"))
    facts = fp8pack.inspect(tmp_path / "out", source)
    assert facts.totals.num_packed == 3 * COUNT + 1
    assert 28 < facts.totals.sqnr_min < 40
    compared = fp8pack.diff(source, tmp_path / "out")
    assert compared.only_in_a == compared.only_in_b == ()
    assert 28 < compared.totals.sqnr_min < 40


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_that_holds_an_expert_fused_and_alone_is_refused(layout: str, tmp_path: Path) -> None:
    """Two tensors would be written under one name."""
    tensors = single_experts()
    name = f"{EXPERTS}.1.up_proj.weight"
    source = write_model(tmp_path / "model", fuse(tensors, layout) | {name: tensors[name]} | rest(), config_of(layout))
    with pytest.raises(InputError) as caught:
        verbs.pack(source, asked("channel"), WriteOptions(tmp_path / "out"))
    assert name in str(caught.value)
    assert not (tmp_path / "out").exists()


MEASURED = """
import json, resource, sys
from pathlib import Path
import fp8pack
out, small, large = map(Path, sys.argv[1:])
peaks = []
for source in (small, large):
    fp8pack.pack(source, out / f"{source.name}-out", scheme="FP8_DYNAMIC", workers=2)
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
print(json.dumps(peaks))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_transposed_experts(tmp_path: Path) -> None:
    """Two tensors of 64 MiB and one of 32 MiB; a few bands are held at a time."""
    small = write_model(tmp_path / "small", fuse(single_experts(), "interleaved") | rest(), config_of("interleaved"))
    tensors: Tensors = {
        f"{EXPERTS}.gate_up_proj": np.full((4, 2048, 4096), 0.5, BF16),
        f"{EXPERTS}.down_proj": np.full((4, 2048, 2048), 0.25, BF16),
    }
    large = write_model(tmp_path / "large", tensors, config_of("interleaved", 2048))
    ran = subprocess.run(
        [sys.executable, "-c", MEASURED, str(tmp_path), str(small), str(large)],
        capture_output=True, text=True, check=False, env=os.environ | {"MALLOC_ARENA_MAX": "2"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    before, after = json.loads(ran.stdout)
    assert after - before < 64 << 20


# FP8 experts that are fused.


def quantized_experts(granularity: str, layout: str) -> tuple[Tensors, dict[str, tuple[NDArray[Any], NDArray[Any]]]]:
    """Fused FP8 tensors with their scales, and payload and scales of each expert."""
    parts = {}
    for name, weight in single_experts().items():
        codes, scales = oracle.quantize(weight.astype(np.float32), "e4m3", granularity)
        parts[name] = (codes.view(E4M3), scales)
    payloads = fuse({name: codes for name, (codes, _) in parts.items()}, layout)
    scales = fuse({name: scales for name, (_, scales) in parts.items()}, layout)
    if granularity == "tensor":  # one for gate and up
        pairs = {f"{EXPERTS}.{i}": parts[f"{EXPERTS}.{i}.gate_proj.weight"][1] for i in range(COUNT)}
        for expert, scale in pairs.items():
            name = f"{expert}.up_proj.weight"
            parts[name] = (parts[name][0], scale)
        scales[f"{EXPERTS}.gate_up_proj"] = np.array([scale.item() for scale in pairs.values()], np.float32)
        down = [parts[f"{EXPERTS}.{i}.down_proj.weight"][1].item() for i in range(COUNT)]
        scales[f"{EXPERTS}.down_proj"] = np.array(down, np.float32)
    return payloads | {f"{name}_scale_inv": scale for name, scale in scales.items()}, parts


def values_of(parts: dict[str, tuple[NDArray[Any], NDArray[Any]]], granularity: str) -> Tensors:
    return {
        name: codes.astype(np.float32)
        * oracle.spread(scales, oracle.region_of(granularity, codes.shape), (codes.shape[0], codes.shape[1]))
        for name, (codes, scales) in parts.items()
    }


FUSED_FP8 = [("rows", "block:128x128"), ("rows", "channel"), ("rows", "tensor"), ("columns", "tensor")]


def write_fp8(folder: Path, layout: str, granularity: str, tensors: Tensors, **more: Any) -> Path:
    size = [128, 128] if granularity.startswith("block") else None
    quantization = BLOCKS | {"weight_block_size": size} | more
    return write_model(folder, tensors | rest(), config_of(layout, quantization_config=quantization))


@pytest.mark.parametrize(("layout", "granularity"), FUSED_FP8)
def test_fused_fp8_experts_unpack_to_fused_floats(layout: str, granularity: str, tmp_path: Path) -> None:
    tensors, parts = quantized_experts(granularity, layout)
    source = write_fp8(tmp_path / "model", layout, granularity, tensors)
    fp8pack.unpack(source, tmp_path / "out", dtype="float32")
    found, expected = read_tensors(tmp_path / "out"), fuse(values_of(parts, granularity), layout)
    assert {name for name in found if "experts" in name} == set(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


@pytest.mark.parametrize(("layout", "granularity"), FUSED_FP8)
@pytest.mark.parametrize("method", ["compressed-tensors", "fp8pack"])
def test_fused_fp8_experts_are_converted_to_single_ones_with_their_bytes(
    method: str, layout: str, granularity: str, tmp_path: Path
) -> None:
    tensors, parts = quantized_experts(granularity, layout)
    source = write_fp8(tmp_path / "model", layout, granularity, tensors)
    facts = fp8pack.convert(source, tmp_path / "out", quant_method=method)
    assert facts.num_carried == 3 * COUNT
    found = read_tensors(tmp_path / "out")
    suffix = "_scale" if method == "compressed-tensors" else "_scale_inv"
    for name, (codes, scales) in parts.items():
        assert found[name].tobytes() == codes.tobytes(), name
        assert found[f"{name}{suffix}"].tobytes() == scales.tobytes(), name
    assert not any(name.endswith(("gate_up_proj", "experts.down_proj")) for name in found)


def test_llama_4s_transposed_experts_are_converted_with_their_bytes(tmp_path: Path) -> None:
    """fbgemm: [E, H, 2I] with [E, 1, 2I], and [E, I, H] with [E, H, 1]; H = I makes the second one ambiguous."""
    for hidden, inner in ((384, 128), (128, 128), (256, 128)):
        parts = {
            name: (codes.view(E4M3), scales)
            for name, weight in single_experts(hidden, inner).items()
            for codes, scales in [oracle.quantize(weight.astype(np.float32), "e4m3", "channel")]
        }
        tensors = fuse({name: codes for name, (codes, _) in parts.items()}, "columns")
        gate, up, down = (
            np.stack([parts[f"{EXPERTS}.{i}.{leaf}_proj.weight"][1] for i in range(COUNT)])
            for leaf in ("gate", "up", "down")
        )
        tensors[f"{EXPERTS}.gate_up_proj_scale"] = np.concatenate([gate, up], 1).transpose(0, 2, 1)
        tensors[f"{EXPERTS}.down_proj_scale"] = down
        folder = tmp_path / f"{hidden}-{inner}"
        quantization = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": []}
        config = config_of("columns", hidden, quantization_config=quantization)
        source = write_model(folder / "model", tensors | rest(hidden), config)
        asked = Request(quant_method="compressed-tensors")
        facts = verbs.convert(source, asked, WriteOptions(folder / "out"))
        assert facts.num_carried == 3 * COUNT
        found = read_tensors(folder / "out")
        for name, (codes, scales) in parts.items():
            assert found[name].tobytes() == codes.tobytes(), (name, hidden, inner)
            assert found[f"{name}_scale"].tobytes() == scales.tobytes(), (name, hidden, inner)


@pytest.mark.parametrize(("layout", "granularity"), FUSED_FP8)
@pytest.mark.parametrize("pattern", ["*experts*", f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.0.down_proj"])
def test_fused_fp8_experts_that_are_ignored_become_bf16_and_never_bytes_without_scales(
    pattern: str, layout: str, granularity: str, tmp_path: Path
) -> None:
    tensors, parts = quantized_experts(granularity, layout)
    linear = "model.layers.0.self_attn.o_proj.weight"
    codes, scales = oracle.quantize(rest()[linear].astype(np.float32), "e4m3", granularity)
    tensors |= {linear: codes.view(E4M3), f"{linear}_scale_inv": scales}
    source = write_model(
        tmp_path / "model",
        rest() | tensors,
        config_of(layout, quantization_config=BLOCKS | {"weight_block_size": [128, 128]}),
    )
    request = Request(scheme="FP8_DYNAMIC", ignore=(Pattern(pattern),))
    verbs.convert(source, request, WriteOptions(tmp_path / "out"))
    found = read_tensors(tmp_path / "out")
    assert not any(tensor.dtype == E4M3 for name, tensor in found.items() if "experts" in name)
    single = {name: values.astype(BF16) for name, values in values_of(parts, granularity).items()}
    fused = fuse(single, layout)
    for name, tensor in found.items():
        if "experts" in name:
            assert tensor.tobytes() == (fused | single)[name].tobytes(), name
    held = [name for name in found if "experts" in name]
    assert set(held) in (set(fused), set(single))


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_fused_fp8_experts_that_a_convention_cannot_hold_become_bf16(layout: str, tmp_path: Path) -> None:
    """Tensor scales to blocks, which experts of 128 x 96 do not fill."""
    parts = {
        name: (codes.view(E4M3), scales)
        for name, weight in single_experts(384, 96).items()
        for codes, scales in [oracle.quantize(weight.astype(np.float32), "e4m3", "tensor", amax=0.2)]
    }
    tensors = fuse({name: codes for name, (codes, _) in parts.items()}, layout)
    scale = next(iter(parts.values()))[1].item()
    tensors |= {f"{name}_scale_inv": np.full(COUNT, scale, np.float32) for name in tuple(tensors)}
    linear = "model.layers.0.self_attn.o_proj.weight"
    codes, scales = oracle.quantize(rest()[linear].astype(np.float32), "e4m3", "tensor")
    tensors |= {linear: codes.view(E4M3), f"{linear}_scale_inv": scales.reshape(())}
    quantization = BLOCKS | {"weight_block_size": None}
    source = write_model(tmp_path / "model", rest() | tensors, config_of(layout, quantization_config=quantization))
    fp8pack.convert(source, tmp_path / "out", scheme="FP8_BLOCK")
    found = read_tensors(tmp_path / "out")
    expected = fuse({name: values.astype(BF16) for name, values in values_of(parts, "tensor").items()}, layout)
    for name, tensor in found.items():
        if "experts" in name:
            assert tensor.dtype != E4M3, name
            if name in expected:
                assert tensor.tobytes() == expected[name].tobytes(), name


def test_static_scales_of_fused_experts_go_to_each_expert(tmp_path: Path) -> None:
    tensors, parts = quantized_experts("tensor", "rows")
    inputs = {leaf: np.arange(1, COUNT + 1, dtype=np.float32) * (i + 1) for i, leaf in enumerate(("gate_up", "down"))}
    tensors |= {f"{EXPERTS}.{leaf}_proj_activation_scale": scale for leaf, scale in inputs.items()}
    source = write_fp8(tmp_path / "model", "rows", "tensor", tensors, activation_scheme="static")
    for method in ("modelopt", "compressed-tensors"):
        fp8pack.convert(source, tmp_path / method, quant_method=method)
        found = read_tensors(tmp_path / method)
        for i in range(COUNT):
            for leaf, whole in (("gate_proj", "gate_up"), ("up_proj", "gate_up"), ("down_proj", "down")):
                scale = found[f"{EXPERTS}.{i}.{leaf}.input_scale"]
                assert scale.item() == inputs[whole][i]
                assert scale.shape == ((1,) if method == "compressed-tensors" else ())
        assert [name for name in found if "activation_scale" in name] == []
        assert found[f"{EXPERTS}.0.up_proj.weight"].tobytes() == parts[f"{EXPERTS}.0.up_proj.weight"][0].tobytes()


def test_fused_experts_with_interleaved_scales_are_refused_and_unpacked_all_the_same(tmp_path: Path) -> None:
    """Blocks that hold rows of gate and of up by turns belong to neither."""
    tensors, _ = quantized_experts("block:128x128", "rows")
    source = write_fp8(tmp_path / "model", "interleaved", "block:128x128", tensors)
    with pytest.raises(InputError, match="cannot be split into per-expert weights") as caught:
        fp8pack.convert(source, tmp_path / "out", scheme="FP8_DYNAMIC")
    assert len(str(caught.value).splitlines()) == 1
    fp8pack.unpack(source, tmp_path / "floats")
    assert fp8pack.inspect(source).totals.num_packed == 2
    facts = fp8pack.diff(source, source)
    assert facts.totals.num_equal == facts.totals.num_tensors


def test_fused_fp8_experts_are_compared_with_single_ones(tmp_path: Path) -> None:
    tensors, _ = quantized_experts("block:128x128", "rows")
    source = write_fp8(tmp_path / "model", "rows", "block:128x128", tensors)
    fp8pack.convert(source, tmp_path / "out", quant_method="compressed-tensors")
    facts = fp8pack.diff(source, tmp_path / "out")
    assert facts.only_in_a == facts.only_in_b == ()
    assert facts.totals.num_equal == facts.totals.num_tensors == 3 * COUNT + len(rest())
    assert {tensor.scale_ratio for tensor in facts.tensors if "experts" in tensor.name} == {(1.0, 1.0)}
    assert fp8pack.inspect(source).totals.num_packed == 2


ARCHITECTURES = {"rows": "HYV4ForCausalLM", "columns": "Llama4ForCausalLM", "interleaved": "GptOssForCausalLM"}


def named_as(layout: str, tensors: Tensors) -> Tensors:
    return {name.replace(".mlp.", ".feed_forward.") if layout == "columns" else name: t for name, t in tensors.items()}


@pytest.mark.parametrize("band", [None, 4 << 10, 20 << 10])
@pytest.mark.parametrize("granularity", ["channel", "block:128x128", "tensor"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_unpack_puts_experts_together_as_the_class_stores_them(
    layout: str, granularity: str, band: int | None, tmp_path: Path
) -> None:
    """Every value is that of the expert unpacked alone, wherever a band ends."""
    single = single_experts(biases=layout == "interleaved")
    config = config_of(layout) | {"architectures": [ARCHITECTURES[layout]]}
    source = write_model(tmp_path / "source", named_as(layout, fuse(single, layout) | rest()), config)
    verbs.pack(source, asked(granularity), WriteOptions(tmp_path / "packed"))
    sizes = Sizes(band=band) if band else Sizes()
    verbs.unpack(tmp_path / "packed", options=WriteOptions(tmp_path / "out", sizes=sizes))
    plain = write_model(tmp_path / "plain", single | rest(), config_of("qwen3_moe"))
    verbs.pack(plain, asked(granularity), WriteOptions(tmp_path / "plain_packed"))
    verbs.unpack(tmp_path / "plain_packed", options=WriteOptions(tmp_path / "plain_out"))
    alone = read_tensors(tmp_path / "plain_out")
    expected = named_as(layout, fuse({name: t for name, t in alone.items() if ".experts." in name}, layout))
    found = read_tensors(tmp_path / "out")
    assert found.keys() == named_as(layout, fuse(single, layout) | rest()).keys()
    for name, tensor in expected.items():
        assert found[name].tobytes() == tensor.tobytes(), name


def test_unpack_leaves_a_layer_alone_that_lacks_an_expert(tmp_path: Path) -> None:
    single = single_experts()
    config = config_of("rows") | {"architectures": [ARCHITECTURES["rows"]]}
    del single[f"{EXPERTS}.1.up_proj.weight"]
    source = write_model(tmp_path / "part", single | rest(), config)
    verbs.pack(source, asked("channel"), WriteOptions(tmp_path / "packed"))
    verbs.unpack(tmp_path / "packed", options=WriteOptions(tmp_path / "out"))
    assert read_tensors(tmp_path / "out").keys() == (single | rest()).keys()
