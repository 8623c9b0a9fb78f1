"""Tiny random BF16 models of transformers, saved as checkpoints with a tokenizer of bytes."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.utils import logging

LAYERS, HEADS, KV_HEADS, HEAD_DIM, EXPERTS = 3, 4, 2, 16, 4
SIZES: dict[str, Any] = {
    "hidden_size": HEADS * HEAD_DIM,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "vocab_size": 272,
    "max_position_embeddings": 64,
}
TEXT = SIZES | {"num_key_value_heads": KV_HEADS, "pad_token_id": 1, "bos_token_id": None, "eos_token_id": 0}
WIDE = TEXT | {"head_dim": HEAD_DIM}
ROUTED = {"num_experts_per_tok": 2}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
CHAT_TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"

TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "a",
    "def add(a, b):\n    return a + b\n",
    "Zażółć gęślą jaźń, 東京 2024",
    "0123456789" * 9,  # cut to the 64 positions that the models have
    "To be, or not to be",
    "{}[]()<>!?",
)


def make_model(family: str, **options: Any) -> Any:
    """A BF16 model with random weights, and norms that are not all one; the same for the same arguments."""
    t = transformers
    match family:
        case "qwen3":
            made = t.Qwen3ForCausalLM, t.Qwen3Config(**WIDE)
        case "gpt_neox":
            made = t.GPTNeoXForCausalLM, t.GPTNeoXConfig(**SIZES)
        case "bert":
            made = t.BertForMaskedLM, t.BertConfig(pad_token_id=1, **SIZES)
        case "bert_base":
            made = t.BertModel, t.BertConfig(pad_token_id=1, **SIZES)
        case "qwen3_moe":
            config = t.Qwen3MoeConfig(num_experts=EXPERTS, moe_intermediate_size=32, **ROUTED, **WIDE)
            made = t.Qwen3MoeForCausalLM, config
        case "mixtral":
            made = t.MixtralForCausalLM, t.MixtralConfig(num_local_experts=EXPERTS, **ROUTED, **TEXT)
        case "gpt_oss":
            rope = {"rope_type": "default", "rope_theta": 10000.0}
            config = t.GptOssConfig(num_local_experts=EXPERTS, rope_parameters=rope, **ROUTED, **WIDE)
            made = t.GptOssForCausalLM, config
        case "gemma2":
            made = t.Gemma2ForCausalLM, t.Gemma2Config(sliding_window=8, **WIDE)
        case "gemma3":
            kinds = ["sliding_attention", "full_attention", "sliding_attention"]
            made = t.Gemma3ForCausalLM, t.Gemma3TextConfig(sliding_window=8, layer_types=kinds, **WIDE)
        case "t5":
            config = t.T5Config(
                **{"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 3, "num_heads": 4, "vocab_size": 272},
                **{"pad_token_id": 1, "eos_token_id": 0, "decoder_start_token_id": 1},
            )
            made = t.T5ForConditionalGeneration, config
        case "llava":
            vision = t.CLIPVisionConfig(image_size=28, patch_size=14, **VISION)
            config = t.LlavaConfig(text_config=t.LlamaConfig(**TEXT), vision_config=vision, image_token_index=260)
            made = t.LlavaForConditionalGeneration, config
        case _:
            raise ValueError(family)
    return randomize(made[0]._from_config(made[1], dtype=torch.bfloat16, **options))


def randomize(model: Any) -> Any:
    """Give a model weights whose activations differ from channel to channel; in evaluation mode."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.15 if parameter.ndim > 1 else parameter.float() + noise * 0.3)
    return model.eval()


def save_model(model: Any, folder: Path, *, chat_template: bool = False) -> Path:
    """Write a model and a tokenizer as a checkpoint; return its directory."""
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    if bars:
        logging.enable_progress_bar()
    make_tokenizer(chat_template=chat_template).save_pretrained(folder)
    return folder


def make_tokenizer(*, chat_template: bool = False) -> Any:
    """One token for each byte, after an end and a padding token."""
    alphabet = ["<end>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")
    fast.chat_template = CHAT_TEMPLATE if chat_template else None
    return fast


def write_prompts(path: Path, texts: Sequence[str] = TEXTS) -> Path:
    """Write texts as a JSONL file of prompts."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path
