"""Models of transformers with FP8 layers, loaded by us and by transformers."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import verbs
from calibration import tiny_models
from checkpoints import DEMO

import fp8pack
import fp8pack.transformers
from fp8pack.calibration.options import CalibrateOptions
from fp8pack.errors import InputError, RecipeError
from fp8pack.modelfacts.patterns import Pattern
from fp8pack.numerics.granularity import parse_granularity
from fp8pack.packing.options import WriteOptions
from fp8pack.planning.recipe import Request
from fp8pack.runtime.experts import FP8Experts
from fp8pack.runtime.model import split_experts

PROMPT = {"input_ids": torch.tensor([[5, 6, 7, 8, 9, 10]])}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**PROMPT).logits.float()


def packed_family(family: str, folder: Path, activations: str = "dynamic") -> Path:
    tiny_models.save_model(tiny_models.make_model(family), folder / "model")
    asked = Request(granularity=parse_granularity("group:32"), quant_method="fp8pack", activations=activations)
    verbs.pack(folder / "model", asked, WriteOptions(folder / "packed"))
    return folder / "packed"


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def check_same(a: Any, b: Any) -> None:
    """Two models hold the same bits, which is ours to promise, and compute the same up to the order of sums.

    That order is torch's: the memory layout of a weight decides which GEMM kernel takes it, and not on each processor
    alike.
    """
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        bits = tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor
        other = theirs[name].view(torch.uint8) if tensor.dtype.itemsize == 1 else theirs[name]
        assert torch.equal(bits, other), name
    assert error(logits(a), logits(b)) < 2**-7


@pytest.mark.parametrize("scheme", ["FP8_BLOCK", "FP8_DYNAMIC", "MXFP8", "W8A16"])
def test_the_demo_model_generates_as_before(tmp_path: Path, scheme: str) -> None:
    fp8pack.pack(DEMO, tmp_path / "out", scheme=scheme)
    model = fp8pack.load_model(tmp_path / "out")
    original = transformers.AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.bfloat16)
    assert error(logits(model), logits(original)) < 0.1
    found = model.generate(**PROMPT, max_new_tokens=5, do_sample=False)
    assert found.shape == (1, 11)
    report = fp8pack.report_fp8(model)
    assert sum(report.on.values()) == 28
    assert report.others == ("lm_head",)
    assert "28 layers on reference" in str(report)
    assert (report.padding, report.fp8_nbytes > 0) == (0.0, True)
    ((scheme_in_words, backend),) = report.on
    assert json.loads(json.dumps(report.to_dict())) == {
        "on": [{"scheme": scheme_in_words, "backend": backend, "layers": 28}],
        "others": ["lm_head"],
        "fp8_nbytes": report.fp8_nbytes,
        "other_nbytes": report.other_nbytes,
        "padding": 0.0,
    }


FAMILIES = ["qwen3", "qwen3_moe", "mixtral", "gpt_neox", "bert", "albert", "gemma3", "llava", "t5"]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_what_we_load(tmp_path: Path, family: str, caplog: pytest.LogCaptureFixture) -> None:
    path = packed_family(family, tmp_path)
    ours = fp8pack.load_model(path)
    transformers.utils.logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        theirs = type(ours).from_pretrained(path)
    transformers.utils.logging.disable_propagation()
    assert "UNEXPECTED" not in caplog.text
    assert "MISSING" not in caplog.text
    assert str(fp8pack.report_fp8(theirs)) == str(fp8pack.report_fp8(ours))
    if family != "t5":
        check_same(theirs, ours)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "mixtral", "gpt_neox", "bert", "gemma3", "llava"])
def test_weight_only_models_compute_what_the_unpacked_ones_do(tmp_path: Path, family: str) -> None:
    path = packed_family(family, tmp_path, "none")
    ours = fp8pack.load_model(path)
    fp8pack.unpack(path, tmp_path / "unpacked")
    unpacked = type(ours).from_pretrained(tmp_path / "unpacked", dtype=torch.bfloat16)
    assert error(logits(ours), logits(unpacked)) < 0.02


def test_experts_run_in_fp8(tmp_path: Path) -> None:
    path = packed_family("qwen3_moe", tmp_path)
    model = fp8pack.load_model(path)
    experts = [module for module in model.modules() if isinstance(module, FP8Experts)]
    assert len(experts) == 2 * tiny_models.LAYERS
    assert all(len(found) == tiny_models.EXPERTS for found in experts)
    with pytest.raises(TypeError, match="linear"):
        torch.add(experts[0][0], torch.ones(1))  # type: ignore[call-overload]


@pytest.mark.parametrize("granularity", ["tensor", "channel", "block:16x32", "block:48x64"])
def test_fused_experts_come_apart(granularity: str) -> None:
    found = parse_granularity(granularity)
    data = torch.randn(3, 48, 64).to(torch.float8_e4m3fn)
    region = found.region((144, 64))
    scale = torch.rand(found.scale_shape((144, 64)))
    whole = fp8pack.PackedTensor("experts", data, scale, "e4m3", granularity, region, torch.bfloat16)
    parts = list(split_experts(whole))
    assert len(parts) == 3
    for part, expected in zip(parts, whole.dequantize(torch.float32), strict=True):
        assert torch.equal(part.dequantize(torch.float32), expected)
        assert fp8pack.linear(torch.ones(2, 64).bfloat16(), part).shape == (2, 48)
    across = fp8pack.PackedTensor("experts", data, torch.rand(2, 1), "e4m3", "block:96x64", (96, 64), torch.bfloat16)
    assert list(split_experts(across)) == []


def test_scales_of_the_kv_cache_are_exposed(tmp_path: Path) -> None:
    options = CalibrateOptions(output=tmp_path / "c.safetensors", num_prompts=16, max_length=32)
    verbs.calibrate(DEMO, options)
    asked = Request(scheme="FP8", calibration=tmp_path / "c.safetensors", kv_cache=True)
    verbs.pack(DEMO, asked, WriteOptions(tmp_path / "out"))
    model: Any = fp8pack.load_model(tmp_path / "out")
    assert sorted(model.kv_scales)[:2] == ["model.layers.0.self_attn.k", "model.layers.0.self_attn.v"]
    report = fp8pack.report_fp8(model)
    assert list(report.on) == [("e4m3 tensor, activations static", "reference")]
    assert "28 layers on reference: e4m3 tensor, activations static" in str(report)


def test_a_model_that_transformers_does_not_know_is_refused(tmp_path: Path) -> None:
    path = packed_family("qwen3", tmp_path)
    config = (path / "config.json").read_text()
    (path / "config.json").write_text(config.replace("Qwen3ForCausalLM", "NobodyForCausalLM"))
    with pytest.raises(InputError, match=r"transformers .* has no NobodyForCausalLM"):
        fp8pack.load_model(path)


def test_several_devices_are_refused(tmp_path: Path) -> None:
    path = packed_family("qwen3", tmp_path)
    for device_map in ({"model": "cpu", "lm_head": "meta"}, {"": "disk"}):
        with pytest.raises(InputError, match="to one CPU or GPU"):
            transformers.AutoModelForCausalLM.from_pretrained(path, device_map=device_map)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, device_map="auto")
    check_same(model, fp8pack.load_model(path))


def test_what_is_used_otherwise_is_dequantized(tmp_path: Path) -> None:
    """An embedding, tied or not, and T5's `wo`, whose dtype its code asks for."""
    tiny_models.save_model(tiny_models.make_model("qwen3"), tmp_path / "model")
    asked = Request(
        granularity=parse_granularity("group:32"), quant_method="fp8pack", pack=(Pattern("model.embed_tokens"),)
    )
    verbs.pack(tmp_path / "model", asked, WriteOptions(tmp_path / "packed"))
    ours = fp8pack.load_model(tmp_path / "packed")
    check_same(type(ours).from_pretrained(tmp_path / "packed"), ours)
    path = packed_family("t5", tmp_path / "t5", "none")
    fp8pack.unpack(path, tmp_path / "unpacked")
    t5 = fp8pack.load_model(path)
    unpacked = type(t5).from_pretrained(tmp_path / "unpacked", dtype=torch.bfloat16)
    found = []
    for model in (t5, type(t5).from_pretrained(path), unpacked):
        with torch.no_grad():
            found.append(model(**PROMPT, decoder_input_ids=PROMPT["input_ids"]).logits.float())
    assert error(found[0], found[1]) < 2**-7
    assert error(found[0], found[2]) < 0.02
    assert any(name.endswith("DenseReluDense.wo") for name in fp8pack.report_fp8(t5).others)


@pytest.mark.parametrize("family", ["gptj", "codegen", "gpt_neo"])
def test_buffers_that_are_not_stored_are_computed(tmp_path: Path, family: str) -> None:
    small = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 8, "vocab_size": 272}
    configs: dict[str, Any] = {
        "gptj": lambda: transformers.GPTJConfig(**small),
        "codegen": lambda: transformers.CodeGenConfig(**small),
        "gpt_neo": lambda: transformers.GPTNeoConfig(
            hidden_size=64, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], vocab_size=272
        ),
    }
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(configs[family](), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    asked = Request(granularity=parse_granularity("group:32"), quant_method="fp8pack", activations="none")
    verbs.pack(tmp_path / "model", asked, WriteOptions(tmp_path / "packed"))
    ours, theirs = fp8pack.load_model(tmp_path / "packed"), type(model).from_pretrained(tmp_path / "packed")
    check_same(ours, theirs)
    assert error(logits(ours), logits(model.eval())) < 0.1


def test_experts_that_the_class_does_not_put_together_are_refused(tmp_path: Path) -> None:
    path = packed_family("gpt_oss", tmp_path)
    for load in (fp8pack.load_model, transformers.AutoModelForCausalLM.from_pretrained):
        with pytest.raises(InputError, match=r"GptOssForCausalLM does not make .*experts.* of one tensor per expert"):
            load(path)


@pytest.mark.slow
def test_many_experts_take_no_longer(tmp_path: Path) -> None:
    """Each name was a pattern of its own once, and each key was held against all of them: minutes for a thousand."""
    config = transformers.Qwen3MoeConfig(
        **tiny_models.WIDE | {"num_hidden_layers": 2, "moe_intermediate_size": 32, "num_experts": 96}
    )
    model = transformers.Qwen3MoeForCausalLM(config).to(torch.bfloat16)
    tiny_models.save_model(model, tmp_path / "model")
    asked = Request(granularity=parse_granularity("group:32"), quant_method="fp8pack")
    verbs.pack(tmp_path / "model", asked, WriteOptions(tmp_path / "packed"))
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert len(loaded._keys_to_ignore_on_load_unexpected) < 60
    check_same(loaded, fp8pack.load_model(tmp_path / "packed"))
    with pytest.raises(ValueError, match="indexed one at a time"):
        loaded.set_experts_implementation("batched_mm")
        logits(loaded)


def test_a_loaded_model_is_not_saved_and_has_no_gradients(tmp_path: Path) -> None:
    path = packed_family("qwen3", tmp_path)
    for model in (fp8pack.load_model(path), transformers.AutoModelForCausalLM.from_pretrained(path)):
        with pytest.raises((InputError, ValueError)):
            model.save_pretrained(tmp_path / "again")
    assert not any(parameter.requires_grad for parameter in fp8pack.load_model(path).parameters())
    with pytest.raises(RecipeError, match="meta device"):
        fp8pack.load_model(path, "meta")
    with torch.inference_mode():
        assert torch.isfinite(logits(fp8pack.load_model(path))).all()
