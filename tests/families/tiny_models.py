"""A tiny random model of every model type that the installed transformers knows."""

import json
import re
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

# The class of a model type is that of the first of these tables which has it.
_TABLES = (
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "MODEL_FOR_PRETRAINING_MAPPING_NAMES",
    "MODEL_FOR_CTC_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_MAPPING_NAMES",
)
MOST_WEIGHTS = 150_000_000

_DERIVED = ("out_features", "out_indices", "stage_names", "per_layer_config", "_name_or_path")
_LAYERS = r"(num_|n_)?(\w+_)?(hidden_)?layers?(_num)?|n_layer|depth|(encoder|decoder)_depth|num_blocks|n_blocks"
_RULES: tuple[tuple[str, int], ...] = (
    (r"(\w+_)?vocab_size|n_vocab|(\w+_)?vocab_sizes", 512),
    (r"max_position_embeddings|n_positions|max_\w+_positions|n_ctx|max_sequence_length", 512),
    (_LAYERS, 2),
    (r"(\w+_)?num_experts|n_routed_experts|num_local_experts|(\w+_)?n_experts|moe_num_experts", 4),
    (r"num_experts_per_tok\w*|top_k|topk|moe_topk|moe_k|num_experts_per_token|moe_top_k|num_selected_experts", 2),
    (r"n_group|num_expert_group|num_nextn_predict_layers|topk_group", 1),
    (r"first_k_dense_replace|moe_layer_start_index|num_dense_layers|\w*dense\w*layers", 1),
    (r"(\w+_)?num_key_value_heads|num_kv_heads|n_head_kv|multi_query_group_num|num_query_groups|n_kv_heads", 2),
    (r"(\w+_)?(num_attention_heads|attention_heads|n_heads|num_heads|n_head|encoder_num_heads|heads)", 4),
    (r"(\w+_)?head_dim|head_size|attention_head_size|d_kv|v_head_dim|qk_nope_head_dim", 64),
    (r"qk_rope_head_dim", 32),
    (r"q_lora_rank|kv_lora_rank|\w*_lora_rank|\w+_low_rank\w*", 128),
    (r"(\w*moe\w*_)?intermediate_size\w*|(\w+_)?ffn_dim|n_inner|ffn_hidden_size|d_ff|hidden_dim|\w*ffn\w*_size", 512),
    (r"\w*intermediate\w*(size|dim)\w*|mlp_dim|moe_\w*size", 512),
    (r"(\w+_)?hidden_size|d_model|n_embd|dim|(\w+_)?embed_dim|embedding_size|model_dim|(\w+_)?width|emb_dim", 256),
    (r"out_hidden_size|projection_dim|(\w+_)?hidden_dim|(\w+_)?embed_size|hidden_dimension", 256),
    (r"image_size|img_size|input_size|vision_image_size", 56),
)


def model_types() -> list[str]:
    """Return the model types that have a class of weights."""
    tables = [getattr(modeling_auto, table) for table in _TABLES]
    return sorted(name for name in CONFIG_MAPPING_NAMES if any(name in table for table in tables))


def classes_of(model_type: str) -> list[str]:
    """Return the names of the classes that a model type may be built as, the first choice first."""
    found = [getattr(modeling_auto, table).get(model_type, ()) for table in _TABLES]
    return list(dict.fromkeys(name for names in found for name in ([names] if isinstance(names, str) else names)))


def make_tiny(model_type: str) -> Any:
    """Return the class of a model type with few, narrow layers of random BF16 weights; raise what transformers does."""
    default = transformers.AutoConfig.for_model(model_type)
    problem: Exception | None = None
    for name in classes_of(model_type):
        for rules in (_RULES, _RULES[:7], ()):
            try:
                return _build(getattr(transformers, name), type(default), shrink(default.to_dict(), rules))
            except Exception as error:  # whatever a class raises at sizes that it does not like
                problem = problem or error
    raise problem or ValueError(model_type)


def _build(cls: Any, config_class: Any, sizes: dict[str, Any]) -> Any:
    with torch.device("meta"):
        weights = sum(weight.numel() for weight in cls(config_class.from_dict(sizes)).parameters())
    if weights > MOST_WEIGHTS:
        raise ValueError(f"{weights:,} weights with short layers")
    torch.manual_seed(0)
    return cls(config_class.from_dict(sizes)).to(torch.bfloat16).eval()


def shrink(config: dict[str, Any], rules: tuple[tuple[str, int], ...]) -> dict[str, Any]:
    """Return a configuration with fewer layers, experts and words, and narrower; sub-configurations too."""
    layers = {value for name, value in config.items() if re.fullmatch(_LAYERS, name) and isinstance(value, int)}
    kinds = [len(set(map(str, value))) for value in config.values() if isinstance(value, list) and len(value) in layers]
    count = max([2, *kinds])
    found: dict[str, Any] = {}
    for name, value in config.items():
        if name in _DERIVED:
            continue
        if isinstance(value, dict) and ("model_type" in value or name.endswith("_config")):
            found[name] = shrink(value, rules)
        elif isinstance(value, list) and len(value) in layers and len(value) > 2:
            first = {str(kind): i for i, kind in reversed(list(enumerate(value)))}
            chosen = sorted(set(first.values()))
            rest = [i for i in range(len(value)) if i not in chosen]
            found[name] = [value[i] for i in sorted(chosen + rest[: count - len(chosen)])]
        elif isinstance(value, int) and not isinstance(value, bool):
            found[name] = _size(name, value, rules, count)
        else:
            found[name] = value
    vocabulary = found.get("vocab_size")
    if isinstance(vocabulary, int):
        for name, value in found.items():
            if name.endswith("_token_id") and isinstance(value, int) and value >= vocabulary:
                found[name] = vocabulary - 1
            if name.endswith("_token_id") and isinstance(value, list):
                found[name] = [min(each, vocabulary - 1) for each in value]
    return found


def _size(name: str, value: int, rules: tuple[tuple[str, int], ...], layers: int) -> int:
    for pattern, most in rules:
        if re.fullmatch(pattern, name):
            return min(value, layers if pattern == _LAYERS else most)
    return value


if __name__ == "__main__":
    import sys

    print(json.dumps(shrink(transformers.AutoConfig.for_model(sys.argv[1]).to_dict(), _RULES), indent=1, default=str))
