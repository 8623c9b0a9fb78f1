"""Facts of a model from `config.json`."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Facts of a model; 0 or empty if the configuration lacks them."""

    architecture: str = ""
    model_type: str = ""
    num_layers: int = 0
    hidden_size: int = 0
    head_dim: int = 0
    num_heads: int = 0
    num_kv_heads: int = 0
    tied: bool = False
    wrapper: bool = False  # a multimodal model around a language model


def read_facts(config: dict[str, Any]) -> ModelFacts:
    """Return the facts of a parsed config.json; sizes come from the language model's section if there is one."""
    text = next(
        (config[key] for key in ("text_config", "llm_config", "language_config") if _is_section(config, key)), config
    )
    match config.get("architectures"):
        case [str(architecture), *_] if architecture.isidentifier():
            pass
        case _:
            architecture = ""
    heads = _count(text, "num_attention_heads", "n_head", "num_heads")
    hidden = _count(text, "hidden_size", "n_embd", "d_model")
    return ModelFacts(
        architecture=architecture,
        model_type=str(config.get("model_type", "")),
        num_layers=_count(text, "num_hidden_layers", "n_layer", "num_layers"),
        hidden_size=hidden,
        head_dim=_count(text, "head_dim") or (hidden // heads if heads else 0),
        num_heads=heads,
        num_kv_heads=_count(text, "num_key_value_heads") or heads,
        tied=config.get("tie_word_embeddings", text.get("tie_word_embeddings")) is True,
        wrapper=text is not config,
    )


def _is_section(config: dict[str, Any], key: str) -> bool:
    return isinstance(config.get(key), dict)


def _count(section: dict[str, Any], *keys: str) -> int:
    values = (section.get(key) for key in keys)
    return next((value for value in values if type(value) is int and 0 < value < 2**31), 0)
