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
from fp8pack.modelfacts.patterns import Pattern

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
        case "llama4":
            experts = {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 256}
            return t.Llama4ForCausalLM(t.Llama4TextConfig(pad_token_id=0, head_dim=64, **experts, **TEXT))
        case "gpt_oss":
            experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
            return t.GptOssForCausalLM(t.GptOssConfig(head_dim=64, **experts, **TEXT))
        case "qwen3_vl_moe":  # where I is the hidden size, so that down alone does not tell how it lies
            rotary = {"rope_type": "default", "mrope_section": [8, 12, 12]}
            sizes = {"moe_intermediate_size": 256, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 64}
            vision = {"depth": 1, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": 256}
            text = TEXT | sizes | {"rope_scaling": rotary}
            config = t.Qwen3VLMoeConfig(text_config=text, vision_config=vision | {"deepstack_visual_indexes": [0]})
            return t.Qwen3VLMoeForConditionalGeneration(config)
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


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["FP8_BLOCK", "FP8_DYNAMIC"])
@pytest.mark.parametrize(
    "family", ["llama", "gemma2", "phi3", "gpt_neox", "bert", "mixtral", "qwen2_moe", "deepseek_v3", "llava"]
)
def test_transformers_loads_what_we_pack_of_every_family(family: str, scheme: str, tmp_path: Path) -> None:
    model = make_model(family).to(torch.bfloat16).eval()
    model.save_pretrained(tmp_path / "source")
    facts = fp8pack.pack(tmp_path / "source", tmp_path / "out", scheme=scheme)
    assert facts.num_packed >= 8
    loaded = type(model).from_pretrained(tmp_path / "out", dtype=torch.bfloat16).eval()
    tokens = torch.arange(5, 25)[None]
    with torch.no_grad():
        expected, found = (m(input_ids=tokens).logits.float() for m in (model, loaded))
    assert torch.isfinite(found).all()
    assert (found - expected).norm() / expected.norm() < 0.15


def make_tied(family: str) -> Any:
    """A model whose head is tied to its embedding, under the name that its class gives it."""
    t = transformers
    torch.manual_seed(0)
    sizes = SIZES | {"pad_token_id": 0}
    match family:
        case "whisper":
            heads = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in HEADS.items()}
            config = t.WhisperConfig(d_model=256, vocab_size=512, num_mel_bins=80, **heads, pad_token_id=0)
            return t.WhisperForConditionalGeneration(config)
        case "roberta":
            return t.RobertaForMaskedLM(t.RobertaConfig(**sizes))
        case "modernbert":
            return t.ModernBertForMaskedLM(t.ModernBertConfig(**sizes, reference_compile=False))
        case "distilbert":
            return t.DistilBertForMaskedLM(
                t.DistilBertConfig(dim=256, hidden_dim=512, n_layers=2, n_heads=4, vocab_size=512, pad_token_id=0)
            )
        case "albert":
            return t.AlbertForMaskedLM(t.AlbertConfig(**sizes, embedding_size=256))
        case _:
            return t.ElectraForMaskedLM(t.ElectraConfig(**sizes, embedding_size=256))


HEADS = {"layers": 2, "attention_heads": 4, "ffn_dim": 512}
TIED = {
    "whisper": "proj_out",
    "roberta": "lm_head.decoder",
    "modernbert": "decoder",
    "distilbert": "vocab_projector",
    "albert": "predictions.decoder",
    "electra": "generator_lm_head",
}


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["FP8_BLOCK", "FP8_DYNAMIC"])
@pytest.mark.parametrize("family", TIED)
def test_a_tied_head_is_ignored_under_the_name_of_its_class(family: str, scheme: str, tmp_path: Path) -> None:
    """Else it is built for FP8, gets no scale, and its logits are noise or NaN, without a word."""
    model = make_tied(family).to(torch.bfloat16).eval()
    model.save_pretrained(tmp_path / "source")
    facts = fp8pack.pack(tmp_path / "source", tmp_path / "out", scheme=scheme)
    assert facts.num_packed >= 6
    verdict = next(engine for engine in facts.engines if engine.engine == "transformers")
    assert verdict.loads
    loaded = type(model).from_pretrained(tmp_path / "out", dtype=torch.bfloat16).eval()
    head = loaded.get_submodule(TIED[family])
    assert head.weight.dtype == torch.bfloat16
    assert torch.equal(head.weight, model.get_submodule(TIED[family]).weight)
    if family != "whisper":  # which wants sound
        tokens = torch.arange(5, 25)[None]
        with torch.no_grad():
            expected, found = (m(input_ids=tokens).logits.float() for m in (model, loaded))
        assert (found - expected).norm() / expected.norm() < 0.15


FUSED = [
    ("llama4", {"scheme": "FP8_DYNAMIC"}, True),
    ("llama4", {"scheme": "FP8_BLOCK"}, False),
    ("gpt_oss", {"scheme": "FP8_DYNAMIC"}, False),
    ("gpt_oss", {"scheme": "FP8_DYNAMIC", "ignore": (Pattern("*experts*"),)}, True),
    ("qwen3_vl_moe", {"scheme": "FP8_BLOCK"}, False),
    ("qwen3_vl_moe", {"scheme": "FP8_BLOCK", "ignore": (Pattern("*experts*"),)}, True),
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "asked", "loads"), FUSED, ids=str)
def test_transformers_finds_every_weight_of_fused_experts_where_we_say_so(
    family: str, asked: dict[str, Any], loads: bool, tmp_path: Path
) -> None:
    model = make_model(family).to(torch.bfloat16).eval()
    model.save_pretrained(tmp_path / "source")
    facts = fp8pack.pack(tmp_path / "source", tmp_path / "out", **asked)
    verdict = next(engine for engine in facts.engines if engine.engine == "transformers")
    loaded, report = type(model).from_pretrained(tmp_path / "out", dtype=torch.bfloat16, output_loading_info=True)
    assert bool(verdict.tp) is (not report["missing_keys"]) is loads
    if loads:
        tokens = torch.arange(5, 25)[None]
        with torch.no_grad():
            expected, found = (m(input_ids=tokens).logits.float() for m in (model, loaded.eval()))
        assert (found - expected).norm() / expected.norm() < 0.25  # a token may be routed to another expert


@pytest.mark.parametrize("family", ["llama4", "gpt_oss", "qwen3_vl_moe"])
def test_experts_taken_apart_are_those_that_the_model_computes_with(family: str, tmp_path: Path) -> None:
    """The layer by its own code in transformers, with one expert at a time, against the weights that we store."""
    model = make_model(family).to(torch.float32).eval()
    model.save_pretrained(tmp_path / "source")
    fp8pack.pack(tmp_path / "source", tmp_path / "out", scheme="FP8_DYNAMIC")
    packed = fp8pack.load_packed(tmp_path / "out")
    experts = next(module for path, module in model.named_modules() if path.endswith("experts"))
    prefix = next(name for name in packed if ".experts.0.gate_proj.weight" in name).split(".experts.")[0]
    hidden = torch.randn(1, 256, generator=torch.Generator().manual_seed(0))
    for i in range(4):
        gate, up, down = (
            packed[f"{prefix}.experts.{i}.{leaf}_proj.weight"].dequantize(torch.float32)
            for leaf in ("gate", "up", "down")
        )
        wide = experts.gate_up_proj[i]
        theirs = hidden @ wide if wide.shape[0] == 256 and family != "qwen3_vl_moe" else hidden @ wide.T
        halves = (theirs[:, ::2], theirs[:, 1::2]) if family == "gpt_oss" else theirs.chunk(2, dim=-1)
        for ours, half in zip((hidden @ gate.T, hidden @ up.T), halves, strict=True):
            assert (ours - half).norm() / half.norm() < 0.1
        inner = torch.randn(1, down.shape[1], generator=torch.Generator().manual_seed(i))
        narrow = experts.down_proj[i]
        expected = inner @ (narrow.T if family == "qwen3_vl_moe" else narrow)
        assert (inner @ down.T - expected).norm() / expected.norm() < 0.1
