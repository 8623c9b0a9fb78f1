"""Every convention that a library here reads: its own code gives the values that we say are stored."""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import DEMO
from torch import Tensor
from transformers.utils import logging

import fp8pack
from fp8pack.numerics.granularity import TENSOR, parse_granularity
from fp8pack.numerics.rounding import ScaleRounding

CT = {"quant_method": "compressed-tensors"}
COMPRESSED = {
    "tensor": {"granularity": TENSOR, **CT},
    "tensor, weight-only": {"granularity": TENSOR, "activations": "none", **CT},
    "channel": {"scheme": "FP8_DYNAMIC"},
    "channel, weight-only": {"scheme": "W8A16"},
    "block": {"scheme": "FP8_BLOCK", **CT},
    "block, weight-only": {"scheme": "FP8_BLOCK", "activations": "none", **CT},
    "group": {"granularity": parse_granularity("group:64"), **CT},
    "mx": {"scheme": "MXFP8"},
    "mx, weight-only": {"scheme": "MXFP8", "activations": "none", **CT},
}
LOADED = {
    "fp8 block": {"scheme": "FP8_BLOCK"},
    "fp8 block, powers of two": {"scheme": "FP8_BLOCK", "scale_rounding": ScaleRounding.UP},
    "fp8 tensor": {"granularity": TENSOR, "quant_method": "fp8", "targets": ("transformers",)},
    "mxfp8": {"scheme": "MXFP8", "quant_method": "mxfp8"},
    "compressed-tensors tensor": COMPRESSED["tensor"],
    "compressed-tensors channel": COMPRESSED["channel"],
    "compressed-tensors block": COMPRESSED["block"],
    "compressed-tensors mx": COMPRESSED["mx"],
    "torchao channel": {"scheme": "FP8_DYNAMIC", "quant_method": "torchao"},
    "torchao tensor": {"granularity": TENSOR, "quant_method": "torchao"},
    "torchao weight-only": {"scheme": "W8A16", "quant_method": "torchao"},
}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Other people's deprecations are not our errors."""
    logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small mixture of experts with random weights, as transformers saves it."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 256, "vocab_size": 512}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 64, "num_hidden_layers": 2}
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(num_experts=4, num_experts_per_tok=2, **sizes, **heads)
    folder = tmp_path_factory.mktemp("moe") / "source"
    transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def load(folder: Path) -> Any:
    """The model as transformers loads it, FP8 weights of its own quantizer dequantized, as it does on a CPU."""
    method = json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"]
    config = transformers.FineGrainedFP8Config(dequantize=True) if method in ("fp8", "mxfp8") else None
    options = {"quantization_config": config} if config else {}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options).eval()


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(torch.arange(5, 133)[None]).logits.float()
    return logits


def unpacked(folder: Path) -> Any:
    """The BF16 model with the weights that we say are stored."""
    bf16 = folder.with_name("bf16")
    fp8pack.unpack(folder, bf16)
    return transformers.AutoModelForCausalLM.from_pretrained(bf16, dtype=torch.bfloat16).eval()


@pytest.mark.parametrize("name", COMPRESSED)
def test_compressed_tensors_validates_our_config_and_decompresses_to_our_values(name: str, tmp_path: Path) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    fp8pack.pack(DEMO, tmp_path / "out", **COMPRESSED[name])
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    validated = QuantizationConfig.model_validate(config)
    group = validated.config_groups["group_0"]
    assert validated.ignore == ["lm_head"]
    compressor = BaseCompressor.get_value_from_registry(config["format"])
    weights = fp8pack.load_packed(tmp_path / "out").items()
    packed = [(name, weight) for name, weight in weights if isinstance(weight, fp8pack.PackedTensor)]
    assert len(packed) == 28
    for weight_name, weight in packed:
        theirs = compressor.decompress({"weight": weight.qdata, "weight_scale": weight.stored_scale}, group)["weight"]
        assert torch.equal(theirs.float(), weight.dequantize(theirs.dtype).float()), weight_name


@pytest.mark.slow
@pytest.mark.parametrize("name", LOADED)
def test_transformers_computes_with_the_values_that_we_say_are_stored(name: str, tmp_path: Path) -> None:
    """Where activations stay BF16 the logits are the same; elsewhere quantizing them moves these by some percent."""
    fp8pack.pack(DEMO, tmp_path / "out", **LOADED[name])
    packed = fp8pack.load_packed(tmp_path / "out")
    model, reference = load(tmp_path / "out"), unpacked(tmp_path / "out")
    found, expected = logits_of(model), logits_of(reference)
    if packed.quant_method in ("fp8", "mxfp8") or name == "torchao weight-only":
        assert torch.equal(found, expected)
    else:
        assert (found - expected).norm() / expected.norm() < 0.1
    for weight_name, weight in packed.items():
        if isinstance(weight, fp8pack.PackedTensor):
            theirs = model.get_parameter(weight_name)
            values = theirs.dequantize() if name.startswith("torchao") else theirs
            ours = weight.dequantize(torch.bfloat16)
            # compressed-tensors rounds scales to BF16 before the product: a relative error of 2^-9, rounded once more
            tolerance = 2**-7 if packed.quant_method == "compressed-tensors" else 0
            torch.testing.assert_close(values, ours, rtol=tolerance, atol=0)


@pytest.mark.parametrize("name", ["fp8 block", "fp8 tensor", "compressed-tensors channel"])
def test_a_mixture_of_experts_computes_with_the_values_that_we_say_are_stored(
    name: str, moe: Path, tmp_path: Path
) -> None:
    facts = fp8pack.pack(moe, tmp_path / "out", **LOADED[name])
    assert facts.num_packed == 2 * (4 + 4 * 3)
    packed = fp8pack.load_packed(tmp_path / "out")
    found, expected = logits_of(load(tmp_path / "out")), logits_of(unpacked(tmp_path / "out"))
    if packed.quant_method == "fp8":
        assert torch.equal(found, expected)
    else:
        assert (found - expected).norm() / expected.norm() < 0.1


@pytest.fixture(scope="module")
def wrapper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small multimodal model with random weights, as transformers saves it."""
    sizes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    text = transformers.LlamaConfig(num_attention_heads=2, num_key_value_heads=2, vocab_size=512, **sizes)
    vision = transformers.CLIPVisionConfig(num_attention_heads=2, image_size=28, patch_size=14, **sizes)
    torch.manual_seed(0)
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=511)
    folder = tmp_path_factory.mktemp("wrapper") / "source"
    transformers.LlavaForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def is_loaded_whole(folder: Path) -> bool:
    """Whether transformers finds every weight; where it does not, it raises or makes some up."""
    from transformers.utils import logging as logs

    method = json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"]
    options = {"quantization_config": transformers.FineGrainedFP8Config(dequantize=True)} if "fp8" in method else {}
    auto = transformers.AutoModelForImageTextToText if "wrapper" in str(folder) else transformers.AutoModelForCausalLM
    logs.set_verbosity_error()
    try:
        _, found = auto.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True, **options)
    except (RuntimeError, AssertionError):
        return False
    return not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*LOADED, "compressed-tensors group"])
@pytest.mark.parametrize("kind", ["moe", "wrapper"])
def test_transformers_loads_experts_and_wrappers_where_we_say_so(
    kind: str, name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    options = LOADED.get(name, COMPRESSED["group"])
    facts = fp8pack.pack(request.getfixturevalue(kind), tmp_path / kind, **options)
    verdict = next(engine for engine in facts.engines if engine.engine == "transformers")
    assert is_loaded_whole(tmp_path / kind) == bool(verdict.tp), verdict.reason
