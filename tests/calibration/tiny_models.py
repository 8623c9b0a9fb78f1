"""Tiny random BF16 models of transformers as checkpoints with a tokenizer of bytes; and what a site must hold."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.utils import logging

from fp8pack.planning.calibration import Site

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
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
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


def _t5() -> Any:
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 3, "num_heads": 4, "vocab_size": 272}
    return transformers.T5Config(pad_token_id=1, eos_token_id=0, decoder_start_token_id=1, **sizes)


def _llava() -> Any:
    vision = transformers.CLIPVisionConfig(image_size=28, patch_size=14, **VISION)
    return transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT), vision_config=vision, image_token_index=260
    )


FAMILIES: dict[str, tuple[str, Callable[[], Any]]] = {
    "qwen3": ("Qwen3ForCausalLM", lambda: transformers.Qwen3Config(**WIDE)),
    "gpt_neox": ("GPTNeoXForCausalLM", lambda: transformers.GPTNeoXConfig(**SIZES)),
    "bert": ("BertForMaskedLM", lambda: transformers.BertConfig(pad_token_id=1, **SIZES)),
    "bert_base": ("BertModel", lambda: transformers.BertConfig(pad_token_id=1, **SIZES)),
    "albert": (
        "AlbertForMaskedLM",
        lambda: transformers.AlbertConfig(embedding_size=16, num_hidden_groups=1, pad_token_id=1, **SIZES),
    ),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        lambda: transformers.Qwen3MoeConfig(num_experts=EXPERTS, moe_intermediate_size=32, **ROUTED, **WIDE),
    ),
    "mixtral": (
        "MixtralForCausalLM",
        lambda: transformers.MixtralConfig(num_local_experts=EXPERTS, **ROUTED, **TEXT),
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        lambda: transformers.GptOssConfig(num_local_experts=EXPERTS, rope_parameters=ROPE, **ROUTED, **WIDE),
    ),
    "gemma2": ("Gemma2ForCausalLM", lambda: transformers.Gemma2Config(sliding_window=8, **WIDE)),
    "gemma3": (
        "Gemma3ForCausalLM",
        lambda: transformers.Gemma3TextConfig(sliding_window=8, layer_types=SLIDING, **WIDE),
    ),
    "t5": ("T5ForConditionalGeneration", _t5),
    "llava": ("LlavaForConditionalGeneration", _llava),
}


def make_model(family: str, **options: Any) -> Any:
    """A BF16 model with random weights, and norms that are not all one; the same for the same arguments."""
    architecture, make_config = FAMILIES[family]
    return randomize(getattr(transformers, architecture)._from_config(make_config(), dtype=torch.bfloat16, **options))


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


def check_site(site: Site, values: torch.Tensor, rows: Sequence[int] | NDArray[np.int64], num_prompts: int) -> None:
    """Every statistic of values [T, K] in the order in which they came; rows [T] is the prompt of each, -1 for none."""
    rows = np.asarray(rows)
    bits = values.detach().to(torch.bfloat16).contiguous().view(torch.uint16).numpy()[rows >= 0]
    rows = rows[rows >= 0]
    magnitudes = bits & 0x7FFF
    bins, counts = np.unique(magnitudes, return_counts=True)
    squares = (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64) ** 2
    name = site.points[0]
    assert site.tokens == len(rows), name
    np.testing.assert_array_equal(site.bins, bins, name)
    np.testing.assert_array_equal(site.counts, counts, name)
    np.testing.assert_array_equal(site.channel_amax, magnitudes.max(axis=0), name)
    np.testing.assert_array_equal(site.channel_squares, np.add.accumulate(squares)[-1], name)
    prompt_amax = [magnitudes[rows == prompt].max(initial=0) for prompt in range(num_prompts)]
    np.testing.assert_array_equal(site.prompt_amax, prompt_amax, name)
