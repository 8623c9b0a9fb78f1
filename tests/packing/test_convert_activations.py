"""From one FP8 convention to another: the scales of activations, and those of K and V."""

import json
from pathlib import Path

import numpy as np
import pytest
import verbs
from checkpoints import Tensors, read_tensors, write_model, write_shard
from packing.fp8_sources import (
    ATTENTION,
    BF16,
    LAYER,
    LINEARS,
    WEIGHTS,
    as_bytes,
    asked,
    config_of,
    config_text,
    convert,
    others,
    quantized,
    request_for,
    source_of,
)

import fp8pack
from fp8pack.checkpoint.calibration_file import write_calibration
from fp8pack.checkpoint.quantized import read_contents
from fp8pack.checkpoint.source import open_checkpoint
from fp8pack.errors import Fp8PackError, InputError
from fp8pack.packing.options import WriteOptions
from fp8pack.planning.calibration import Calibration, Site
from fp8pack.planning.recipe import Request

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
        verbs.convert(source, asked(method="modelopt"), WriteOptions(tmp_path / "out"))
    assert f"{LAYER}.mlp.up_proj" in str(caught.value)
    assert "--calibration" in caught.value.command_line


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
    facts = verbs.convert(source, request, WriteOptions(tmp_path / "out"))
    assert facts.num_carried == len(LINEARS)
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
    fp8pack.unpack(source, tmp_path / "floats", dtype="float32")
    request = Request(scheme="FP8", kv_cache=True, calibration=calibrate(source, "", inputs=True))
    found = convert(source, tmp_path / "out", request)
    assert {found[f"{module}.input_scale"].item() for module in LINEARS} == {0.5}
    if granularity != "tensor":  # whose scales are carried, each its own
        verbs.pack(tmp_path / "floats", request, WriteOptions(tmp_path / "expected"))
        assert as_bytes(tmp_path / "out") == as_bytes(tmp_path / "expected")
