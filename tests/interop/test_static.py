"""Static activations and KV-cache scales: what the libraries and the rules of the engines make of our files."""

import json
import re
import warnings
from collections.abc import Iterator
from fnmatch import fnmatch
from inspect import signature
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import verbs
from checkpoints import DEMO, MakeCheckpoint, llama_config, llama_tensors, random_weight
from safetensors import safe_open
from torch import Tensor, nn

import fp8pack
from fp8pack.checkpoint.calibration_file import write_calibration
from fp8pack.checkpoint.source import open_checkpoint
from fp8pack.modelfacts.patterns import Pattern
from fp8pack.numerics.simulate import Dynamic, Static, simulated
from fp8pack.packing.options import WriteOptions
from fp8pack.planning.calibration import Calibration, Site, histogram_of
from fp8pack.planning.recipe import Request

transformers = pytest.importorskip("transformers")

FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Other people's deprecations are not our errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def site_of(point: str, value: Tensor) -> Site:
    """The statistics of one tensor [..., K], as one prompt."""
    bits = value.to(torch.bfloat16).reshape(-1, value.shape[-1]).view(torch.int16).numpy().view(np.uint16) & 0x7FFF
    bins, counts = histogram_of(np.bincount(bits.ravel(), minlength=1 << 15))
    channels = bits.max(0).astype(np.uint16)
    squares = (value.double().reshape(-1, value.shape[-1]) ** 2).sum(0).numpy()
    return Site((point,), bits.shape[0], bins, counts, channels, squares, np.array([bits.max()], np.uint16))


def sites_of(model: nn.Module, tokens: Tensor) -> list[Site]:
    """What enters every linear, and K after rotary and V, of a Qwen3 model in eager attention; by hooks of our own."""
    seen: dict[str, Tensor] = {}

    def keep(point: str) -> Any:
        return lambda module, args: seen.__setitem__(point, args[0].detach())

    hooks = [
        module.register_forward_pre_hook(keep(f"{path}.input"))
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and path != "lm_head"
    ]
    with torch.no_grad():
        cache = model(tokens, use_cache=True).past_key_values
    for hook in hooks:
        hook.remove()
    for i, layer in enumerate(cache.layers):
        for kind, states in (("k", layer.keys), ("v", layer.values)):  # [B, heads, T, D]
            seen[f"model.layers.{i}.self_attn.{kind}"] = states.transpose(1, 2).flatten(2)
    return [site_of(point, value) for point, value in seen.items()]


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    """The first tokens of the held-out text."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO)
    text = (DEMO / "heldout.txt").read_text(encoding="utf-8")[:2000]
    found: Tensor = tokenizer(text, return_tensors="pt").input_ids[:, :128]
    return found


@pytest.fixture(scope="module")
def reference(tokens: Tensor) -> Tensor:
    """Logits of the BF16 model."""
    model = transformers.AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.bfloat16)
    with torch.no_grad():
        logits: Tensor = model(tokens).logits.float()
    return logits


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory, tokens: Tensor) -> Path:
    """A calibration of the demo model on these tokens."""
    model = transformers.AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.bfloat16)
    path = tmp_path_factory.mktemp("calibration") / "c.safetensors"
    fingerprint = open_checkpoint(DEMO).fingerprint
    write_calibration(path, Calibration(fingerprint, ("blake3:p",), {}, tuple(sites_of(model, tokens))))
    return path


def pack(calibration: Path, output: Path, **asked: Any) -> dict[str, Any]:
    return fp8pack.pack(DEMO, output, **{"scheme": "FP8", "calibration": calibration, **asked})


def loss(logits: Tensor, tokens: Tensor) -> float:
    return nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:]).item()


def read_with_safetensors(folder: Path) -> dict[str, Tensor]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize("method", ["modelopt", "compressed-tensors", "fp8pack"])
def test_the_safetensors_library_reads_what_load_packed_reads(method: str, calibration: Path, tmp_path: Path) -> None:
    pack(calibration, tmp_path / "out", quant_method=method, kv_cache=True)
    theirs, ours = read_with_safetensors(tmp_path / "out"), fp8pack.load_packed(tmp_path / "out")
    scales = 0
    for name, tensor in ours.items():
        if not isinstance(tensor, fp8pack.PackedTensor):
            assert torch.equal(theirs[name], tensor)
            continue
        module = name.removesuffix(".weight")
        assert torch.equal(theirs[name].view(torch.uint8), tensor.qdata.view(torch.uint8))
        assert torch.equal(theirs[f"{module}.input_scale"], tensor.input_scale)
        scales += 1
    kv = [name for name in theirs if name.endswith(("k_scale", "v_scale"))]
    assert sorted(theirs[name].item() for name in kv) == sorted(scale.item() for scale in ours.kv_scales.values())
    assert (scales, len(kv), len(theirs)) == (28, 8, len(ours) + 2 * 28 + 8)


@pytest.mark.parametrize("kv_cache", [False, True])
def test_compressed_tensors_validates_our_config_and_decompresses_to_our_values(
    kv_cache: bool, calibration: Path, tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import (
        QuantizationConfig,
        QuantizationStatus,
        QuantizationStrategy,
        QuantizationType,
    )

    pack(calibration, tmp_path / "out", quant_method="compressed-tensors", kv_cache=kv_cache)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    validated = QuantizationConfig.model_validate(config)
    group = validated.config_groups["group_0"]
    assert validated.quantization_status == QuantizationStatus.COMPRESSED
    assert validated.ignore == ["lm_head"]
    arguments = [group.weights, group.input_activations, *([validated.kv_cache_scheme] if kv_cache else [])]
    for found in arguments:
        assert found is not None
        assert (found.strategy, found.type, found.num_bits) == (
            QuantizationStrategy.TENSOR,
            QuantizationType.FLOAT,
            8,
        )
        assert (found.dynamic, found.symmetric) == (False, True)
    assert (validated.kv_cache_scheme is not None) == kv_cache
    compressor = BaseCompressor.get_value_from_registry(config["format"])
    packed = [t for t in fp8pack.load_packed(tmp_path / "out").values() if isinstance(t, fp8pack.PackedTensor)]
    assert len(packed) == 28
    for tensor in packed:
        theirs = compressor.decompress({"weight": tensor.qdata, "weight_scale": tensor.stored_scale}, group)["weight"]
        assert torch.equal(theirs.float(), tensor.dequantize(theirs.dtype).float()), tensor.name


def test_compressed_tensors_rounds_activations_as_we_do(calibration: Path, tmp_path: Path) -> None:
    """Its fake quantization with our static scale is fp8pack.numerics.simulate, float32 in and out."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize

    from fp8pack.numerics.simulate import round_activations

    pack(calibration, tmp_path / "out", quant_method="compressed-tensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    arguments = QuantizationConfig.model_validate(config).config_groups["group_0"].input_activations
    scale = fp8pack.load_packed(tmp_path / "out")["model.layers.0.mlp.down_proj.weight"].input_scale
    x = torch.randn(7, 512, generator=torch.Generator().manual_seed(0)) * scale * 200
    theirs = fake_quantize(x, scale=scale, zero_point=torch.zeros(1), args=arguments)
    assert torch.equal(theirs, round_activations(x, Static(scale.item())))


def reads_kv_scales(model: Any) -> bool:
    """Whether compressed-tensors (0.20) finds attention, by its argument `past_key_values`.

    transformers 5.24 calls it `cache`. Then scales of K and V stay unread, as docs/engines.md says of transformers.
    """
    attention = model.get_submodule("model.layers.0.self_attn")
    return "past_key_values" in signature(type(attention).forward).parameters


@pytest.mark.slow
@pytest.mark.parametrize("kv_cache", [False, True])
@pytest.mark.parametrize("dequantize", [False, True])
def test_transformers_loads_it_and_computes_nearly_what_bf16_computes(
    kv_cache: bool, dequantize: bool, calibration: Path, tokens: Tensor, reference: Tensor, tmp_path: Path
) -> None:
    pack(calibration, tmp_path / "out", quant_method="compressed-tensors", kv_cache=kv_cache)
    options = {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.bfloat16, output_loading_info=True, **options
    )
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    if not dequantize:
        assert not info["unexpected_keys"] or not reads_kv_scales(model)
        assert all(re.search(r"self_attn\.[kv]_scale$", name) for name in info["unexpected_keys"])
    with torch.no_grad():
        logits = model(tokens).logits.float()
    assert torch.isfinite(logits).all()
    assert (logits.argmax(-1) == reference.argmax(-1)).float().mean() > 0.85
    assert abs(loss(logits, tokens) - loss(reference, tokens)) < 0.05


@pytest.mark.parametrize("kv_cache", [False, True])
def test_transformers_holds_the_scales_of_the_file(kv_cache: bool, calibration: Path, tmp_path: Path) -> None:
    pack(calibration, tmp_path / "out", quant_method="compressed-tensors", kv_cache=kv_cache)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    ours, state = fp8pack.load_packed(tmp_path / "out"), model.state_dict()
    for name, tensor in ours.items():
        if isinstance(tensor, fp8pack.PackedTensor):
            found = state[f"{name.removesuffix('.weight')}.input_scale"].float()
            torch.testing.assert_close(found, tensor.input_scale, rtol=2**-8, atol=0)
    assert len(ours.kv_scales) == (8 if kv_cache else 0)
    for point, scale in ours.kv_scales.items():
        assert (f"{point}_scale" in state) == reads_kv_scales(model)
        if reads_kv_scales(model):
            torch.testing.assert_close(state[f"{point}_scale"].float(), scale, rtol=2**-8, atol=0)


@pytest.mark.parametrize("static", [False, True])
def test_simulated_fp8_products_stay_near_bf16(
    static: bool, calibration: Path, tokens: Tensor, reference: Tensor, tmp_path: Path
) -> None:
    pack(calibration, tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.bfloat16)
    linears = {
        name.removesuffix(".weight"): (
            tensor.dequantize(torch.float32),
            Static(tensor.input_scale.item()) if static else Dynamic(),
        )
        for name, tensor in fp8pack.load_packed(tmp_path / "out").items()
        if isinstance(tensor, fp8pack.PackedTensor)
    }
    with torch.no_grad(), simulated(model, linears):
        logits = model(tokens).logits.float()
    assert not torch.equal(logits, reference)
    assert (logits.argmax(-1) == reference.argmax(-1)).float().mean() > 0.85
    assert abs(loss(logits, tokens) - loss(reference, tokens)) < 0.05
    with torch.no_grad():
        assert torch.equal(model(tokens).logits.float(), reference)


def test_no_value_of_the_calibration_saturates_under_its_scale(
    calibration: Path, tmp_path: Path, tokens: Tensor
) -> None:
    """amax / scale is 448 up to one rounding, in the cache too."""
    pack(calibration, tmp_path / "out", kv_cache=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.bfloat16)
    amax = {site.points[0]: site.amax for site in sites_of(model, tokens)}
    loaded = fp8pack.load_packed(tmp_path / "out")
    scales = dict(loaded.kv_scales)
    for module in (name.removesuffix(".weight") for name in loaded if "proj" in name):
        scales[f"{module}.input"] = loaded[f"{module}.weight"].input_scale
    assert scales.keys() == amax.keys()
    for point, scale in scales.items():
        assert amax[point] / scale.item() <= 448 * (1 + 2**-23), point
        assert amax[point] / scale.item() >= 448 * (1 - 2**-23), point


# What engines that cannot run here read of modelopt.


def vllm_excludes(prefix: str, parts: list[str], patterns: list[str]) -> bool:
    """vLLM's modelopt: exact name; the parts of a fused module, which must agree; substring; fnmatch."""
    named = [part in patterns for part in parts]
    assert len(set(named)) <= 1, f"{prefix}: one part of a fused module is excluded and another is not"
    found = prefix in patterns or any(named)
    return found or any(pattern in prefix or fnmatch(prefix, pattern) for pattern in patterns)


def sglang_excludes(prefix: str, patterns: list[str]) -> bool:
    """SGLang's modelopt_fp8: a glob over the whole name or over any dotted part."""
    names = [prefix, prefix.removeprefix("language_model."), *prefix.split(".")]
    return any(fnmatch(name, pattern) for name in names for pattern in patterns)


def engine_modules(modules: list[str]) -> dict[str, list[str]]:
    """The modules that an engine builds, and the parts of the checkpoint that each is loaded from."""
    found: dict[str, list[str]] = {}
    for module in modules:
        parent, _, leaf = module.rpartition(".")
        fused = FUSED.get(leaf, leaf)
        found.setdefault(f"{parent}.{fused}" if parent else leaf, []).append(module)
    return found


def read_as_modelopt(folder: Path) -> tuple[dict[str, Tensor], list[str], bool]:
    """Hold both JSON files against what vLLM, SGLang and TensorRT-LLM ask; return tensors, excluded names, cache."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    nested = json.loads((folder / "hf_quant_config.json").read_text())
    assert config["quant_method"].startswith("modelopt")
    assert config["quant_algo"].upper() == "FP8"
    assert "FP8" in config["quant_algo"]
    assert "MXFP8" not in config["quant_algo"]
    assert set(nested) == {"producer", "quantization"}
    assert {"name", "version"} <= nested["producer"].keys()
    quantization = nested["quantization"]
    assert {"quant_algo", "kv_cache_quant_algo", "exclude_modules"} <= quantization.keys()
    assert quantization["quant_algo"] == "FP8"
    assert quantization["exclude_modules"] == config["ignore"]
    assert all(isinstance(entry, str) and not set(entry) & set("*?[]") for entry in config["ignore"])
    group = config["config_groups"]["group_0"]
    for arguments in (group["weights"], group["input_activations"]):
        assert (arguments["num_bits"], arguments["type"], arguments["dynamic"]) == (8, "float", False)
    cache = config.get("kv_cache_scheme")
    assert (quantization["kv_cache_quant_algo"] == "FP8") == (cache is not None)
    assert cache is None or (cache["num_bits"], cache["type"]) == (8, "float")
    return read_with_safetensors(folder), config["ignore"], cache is not None


def check_modelopt(folder: Path) -> None:
    """Every linear that an engine takes for FP8 has its weight and both scales, every other one has neither."""
    tensors, excluded, has_cache = read_as_modelopt(folder)
    linears = [
        name.removesuffix(".weight")
        for name, tensor in tensors.items()
        if name.endswith(".weight") and tensor.ndim == 2 and "embed_tokens" not in name
    ]
    assert linears
    used: set[str] = set()
    for prefix, parts in engine_modules(linears).items():
        keeps = [vllm_excludes(prefix, parts, excluded)]
        keeps += [sglang_excludes(part, excluded) for part in parts]
        assert len(set(keeps)) == 1, f"{prefix}: {keeps}"
        weight_scales, input_scales = set(), set()
        for part in parts:
            if keeps[0]:
                assert tensors[f"{part}.weight"].dtype == torch.bfloat16
                assert f"{part}.weight_scale" not in tensors
                assert f"{part}.input_scale" not in tensors
                continue
            assert tensors[f"{part}.weight"].dtype == torch.float8_e4m3fn
            for suffix, group in (("weight_scale", weight_scales), ("input_scale", input_scales)):
                scale = tensors[f"{part}.{suffix}"]
                assert (scale.dtype, scale.shape) == (torch.float32, ())
                assert torch.isfinite(scale)
                assert scale > 0
                group.add(scale.item())
                used.add(f"{part}.{suffix}")
        assert len(weight_scales) == len(input_scales) == (not keeps[0]), f"{prefix}: its parts would be requantized"
    cache = {name for name in tensors if name.endswith(("k_scale", "v_scale"))}
    for name in cache:
        assert name.endswith((".self_attn.k_proj.k_scale", ".self_attn.v_proj.v_scale"))
        assert (tensors[name].dtype, tensors[name].shape) == (torch.float32, ())
        assert tensors[name] > 0
    attentions = {name.rpartition(".")[0].rpartition(".")[0] for name in cache}
    assert len(cache) == 2 * len(attentions)
    assert bool(cache) == has_cache
    assert {name for name in tensors if name.endswith("_scale")} == used | cache


@pytest.mark.parametrize("kv_cache", [False, True])
def test_engines_read_modelopt_of_a_dense_model(kv_cache: bool, calibration: Path, tmp_path: Path) -> None:
    pack(calibration, tmp_path / "out", kv_cache=kv_cache)
    check_modelopt(tmp_path / "out")


@pytest.mark.parametrize("pattern", ["*.1.self_attn.q_proj", "*.0.mlp.up_proj", "*.1.mlp.down_proj", "*.0.*"])
def test_engines_read_modelopt_of_which_a_part_is_kept(pattern: str, calibration: Path, tmp_path: Path) -> None:
    pack(calibration, tmp_path / "out", kv_cache=True, ignore=(Pattern(pattern),))
    check_modelopt(tmp_path / "out")


def test_engines_read_modelopt_of_a_mixture_of_experts(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """Routers and their like bear names that begin as those of packed weights do."""
    tensors = llama_tensors(12)
    mlp = "model.layers.1.mlp"
    for name in [name for name in tensors if name.startswith(f"{mlp}.")]:
        del tensors[name]
    for i in range(3):
        for leaf, shape in (("gate_proj", (128, 256)), ("up_proj", (128, 256)), ("down_proj", (256, 128))):
            tensors[f"{mlp}.experts.{i}.{leaf}.weight"] = random_weight(shape, i)
            tensors[f"{mlp}.shared_expert.{leaf}.weight"] = random_weight(shape, 7)
    tensors |= {
        f"{mlp}.gate.weight": random_weight((16, 256)),
        f"{mlp}.shared_expert_gate.weight": random_weight((1, 256)),
    }
    source = make_checkpoint(tensors, config=llama_config(layers=12))
    x = torch.from_numpy(random_weight((40, 8), 3).astype(ml_dtypes.bfloat16).astype(np.float32))
    points = [f"{name.removesuffix('.weight')}.input" for name in tensors if name.endswith("_proj.weight")]
    points += [f"model.layers.{i}.self_attn.{kind}" for i in range(12) for kind in "kv"]
    path = tmp_path / "c.safetensors"
    write_calibration(path, Calibration("", ("blake3:p",), {}, tuple(site_of(point, x) for point in points)))
    asked = Request(scheme="FP8", calibration=path, kv_cache=True)
    assert verbs.pack(source, asked, WriteOptions(tmp_path / "out")).num_packed == 11 * 3 + 12 * 4 + 4 * 3
    check_modelopt(tmp_path / "out")
