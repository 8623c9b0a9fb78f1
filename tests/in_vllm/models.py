"""Small models as transformers saves them, in shapes that vLLM takes."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from checkpoints import DEMO
from safetensors.torch import load_file, save_file

TEXT: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 4096,  # of the demo model, whose tokenizer they share
    "max_position_embeddings": 512,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 256}
MLA = {"q_lora_rank": 128, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64, "v_head_dim": 64}
ROUTING: dict[str, Any] = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "topk_method": "noaux_tc",  # as the published config.json has it
}
VISION = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}


def _causal(config: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_config(config)


def _without(*names: str) -> dict[str, Any]:
    return {name: value for name, value in TEXT.items() if name not in names}


def _paligemma() -> Any:
    vision = transformers.SiglipVisionConfig(image_size=56, patch_size=14, vision_use_head=False, **VISION)
    text = transformers.GemmaConfig(**TEXT)
    config = transformers.PaliGemmaConfig(
        vision_config=vision, text_config=text, image_token_index=4000, projection_dim=256
    )
    return transformers.PaliGemmaForConditionalGeneration(config)


def _idefics3() -> Any:
    vision = VISION | {"image_size": 56, "patch_size": 14}
    text = {"model_type": "llama", "pad_token_id": 0, **TEXT}
    config = transformers.Idefics3Config(
        vision_config=vision, text_config=text, image_token_id=4000, pad_token_id=0, tie_word_embeddings=False
    )
    return transformers.Idefics3ForConditionalGeneration(config)


FAMILIES: dict[str, Callable[[], Any] | None] = {
    "Qwen3": None,  # the demo model, which is trained
    "Phi3": lambda: _causal(transformers.Phi3Config(pad_token_id=0, **_without("head_dim"))),
    "Mixtral": lambda: _causal(transformers.MixtralConfig(num_local_experts=4, **TEXT)),
    "Qwen3Moe": lambda: _causal(transformers.Qwen3MoeConfig(num_experts=4, **EXPERTS, **TEXT)),
    "DeepseekV3": lambda: _causal(
        transformers.DeepseekV3Config(**_without("head_dim", "num_key_value_heads"), **EXPERTS, **MLA, **ROUTING)
    ),
    "PaliGemma": _paligemma,  # of those with images, two whose classes do not import torchvision
    "Idefics3": _idefics3,
}


def save(family: str, folder: Path) -> Path:
    """Write a BF16 model of a family, random with the tokenizer of the demo model; return its directory."""
    make = FAMILIES[family]
    if make is None:
        return shutil.copytree(DEMO, folder)
    torch.manual_seed(0)
    make().to(torch.bfloat16).save_pretrained(folder)
    if family == "PaliGemma":  # the published files have this prefix, which transformers 5 no longer writes
        tensors = load_file(folder / "model.safetensors")
        named = {re.sub(r"^vision_tower\.", "vision_tower.vision_model.", name): t for name, t in tensors.items()}
        save_file(named, folder / "model.safetensors", {"format": "pt"})
    for path in DEMO.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder
