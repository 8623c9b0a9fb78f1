"""Small random models of many families: transformers saves them, fp8pack packs them, transformers loads them."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.utils import logging

import fp8pack
from fp8pack.packing.prepare import WriteOptions
from fp8pack.planning.recipe import Request

SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 512,
}
TEXT = SIZES | {"num_key_value_heads": 2}
MLA = {"q_lora_rank": 128, "kv_lora_rank": 96, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 64}
ROUTING = {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
VISION = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}


def make_model(family: str) -> Any:
    """A model with random weights."""
    t, causal = transformers, transformers.AutoModelForCausalLM.from_config
    torch.manual_seed(0)
    match family:
        case "llama":
            return causal(t.LlamaConfig(**TEXT))
        case "gemma2":
            return causal(t.Gemma2Config(head_dim=64, **TEXT))
        case "phi3":
            return causal(t.Phi3Config(pad_token_id=0, **TEXT))
        case "gpt_neox":
            return causal(t.GPTNeoXConfig(**SIZES))
        case "bert":
            return t.BertForMaskedLM(t.BertConfig(**SIZES))
        case "mixtral":
            return causal(t.MixtralConfig(num_local_experts=4, **TEXT))
        case "qwen2_moe":
            sizes = {"moe_intermediate_size": 256, "shared_expert_intermediate_size": 256, "num_experts": 4}
            return causal(t.Qwen2MoeConfig(**sizes, **TEXT))
        case "deepseek_v3":
            sizes = SIZES | MLA | ROUTING | {"moe_intermediate_size": 128, "n_shared_experts": 1}
            return causal(t.DeepseekV3Config(num_key_value_heads=4, **sizes))
        case _:
            vision = t.CLIPVisionConfig(image_size=56, patch_size=14, **VISION)
            return t.LlavaForConditionalGeneration(
                t.LlavaConfig(text_config=t.LlamaConfig(**TEXT), vision_config=vision)
            )


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Other people's deprecations are not our errors."""
    logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("scheme", ["FP8_BLOCK", "FP8_DYNAMIC"])
@pytest.mark.parametrize(
    "family", ["llama", "gemma2", "phi3", "gpt_neox", "bert", "mixtral", "qwen2_moe", "deepseek_v3", "llava"]
)
def test_transformers_loads_what_we_pack_of_every_family(family: str, scheme: str, tmp_path: Path) -> None:
    model = make_model(family).to(torch.bfloat16).eval()
    model.save_pretrained(tmp_path / "source")
    facts = fp8pack.pack(tmp_path / "source", Request(scheme=scheme), WriteOptions(tmp_path / "out"))
    assert facts["num_packed"] >= 8
    loaded = type(model).from_pretrained(tmp_path / "out", dtype=torch.bfloat16).eval()
    tokens = torch.arange(5, 25)[None]
    with torch.no_grad():
        expected, found = (m(input_ids=tokens).logits.float() for m in (model, loaded))
    assert torch.isfinite(found).all()
    assert (found - expected).norm() / expected.norm() < 0.15
