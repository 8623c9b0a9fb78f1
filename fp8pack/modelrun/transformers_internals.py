"""All uses of undocumented names of transformers, in one file: any release of `transformers>=5,<6` may move them.

tests/modelrun/test_transformers_internals.py has a test for each name, so that such a release fails there.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.initialization import no_init_weights
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, LoadStateDictConfig
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.generic import GeneralInterface
from transformers.utils.quantization_config import QuantizationConfigMixin

__all__ = [
    "HfQuantizer",
    "QuantizationConfigMixin",
    "get_class_from_dynamic_module",
    "no_init_weights",
    "register_quantization_config",
    "register_quantizer",
]

Kind = Literal["attn", "experts"]


# Names and weights.


def renamed(model: Any, checkpoint: Iterable[str] | None) -> Iterator[tuple[str, str]]:
    """Yield (parameter in memory, tensor of the checkpoint) for each tensor that is loaded into a parameter.

    checkpoint: the names of its tensors; by default those that `save_pretrained` would write.
    """
    in_memory = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
    transforms = get_model_conversion_mapping(model)
    if checkpoint is None:
        checkpoint = revert_weight_conversion(model, in_memory).keys()
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    targets = {pattern: converter.target_patterns for converter in converters for pattern in converter.source_patterns}
    for name in checkpoint:
        found, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, in_memory)
        if found not in in_memory and name in in_memory:
            found, pattern = name, None
        parts = targets[pattern] if pattern is not None else [found]
        for part in parts:
            yield (found.replace(parts[0], part) if pattern is not None else found), name


def make_model(model_class: Any, config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """Return a model of a class and a configuration."""
    model: PreTrainedModel = model_class._from_config(config, dtype=dtype)
    return model


def load_tensors(model: PreTrainedModel, tensors: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> Any:
    """Set parameters from the checkpoint's tensors, in a dtype; return transformers' report.

    The report has `mismatched_keys` and `conversion_errors`.
    """
    config = LoadStateDictConfig(
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        weight_mapping=get_model_conversion_mapping(model),  # type: ignore[arg-type]
        device_map={"": str(device)},
    )
    info, _ = convert_and_load_state_dict_in_model(model, dict(tensors), config)
    return info


# Attention and experts, which transformers looks up in registries.


def implementations(model: Any, kind: Kind) -> dict[str, str]:
    """Return the implementations of a model and its parts, with the keys of its setter."""
    parts = {"": model.config} | {key: getattr(model.config, key) for key in model.config.sub_configs}
    return {key: getattr(config, f"_{kind}_implementation") for key, config in parts.items() if config is not None}


def takes_attention(model: Any) -> bool:
    """Say whether the attention of a model can be replaced."""
    return bool(model._can_set_attn_implementation())


def supports_sdpa(model: nn.Module) -> bool:
    """Say whether every part of a model can run on torch's scaled_dot_product_attention."""
    return all(part._supports_sdpa for part in model.modules() if isinstance(part, PreTrainedModel))


def add_attention(name: str, base: str, function: Callable[..., Any], undo: ExitStack) -> None:
    """Register an attention function with the masks of another, until `undo` is closed."""
    _register(ALL_ATTENTION_FUNCTIONS, name, function, undo)
    _register(ALL_MASK_ATTENTION_FUNCTIONS, name, ALL_MASK_ATTENTION_FUNCTIONS[base], undo)


def add_experts(name: str, function: Callable[..., Any], undo: ExitStack) -> None:
    """Register a function that runs the experts of a layer, until `undo` is closed."""
    _register(ALL_EXPERTS_FUNCTIONS, name, function, undo)


def attention_of(module: nn.Module, base: str) -> Callable[..., Any]:
    """Return the attention function of a module: `sdpa`, or `eager` from the file of its class."""
    if base != "eager":
        found: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[base]
        return found
    eager: Callable[..., Any] = vars(sys.modules[type(module).__module__])["eager_attention_forward"]
    return eager


def is_experts(module: nn.Module) -> bool:
    """Say whether a module is experts that transformers looks up how to run: their decorator sets these attributes."""
    return {"has_gate", "has_bias", "is_transposed"} <= vars(module).keys()


def activate_expert(module: Any, value: Tensor) -> Tensor:
    """Return the output of an expert's first projection after its activation function."""
    activated: Tensor = module._apply_gate(value) if module.has_gate else module.act_fn(value)
    return activated


def norm_expert(module: Any, value: Tensor) -> Tensor:
    """Return the output of an expert's down projection, normed if the class does so."""
    has_norm = vars(module).get("has_post_expert_norm", False)
    result: Tensor = module.post_expert_norm(value) if has_norm else value
    return result


def _register(registry: GeneralInterface, name: str, function: Callable[..., Any], undo: ExitStack) -> None:
    undo.callback(type(registry)._global_mapping.pop, name, None)
    registry.register(name, function)


# Caches.

CACHE_NAMES = ("cache", "past_key_values", "past_key_value")  # the last two in classes of their own


def num_cached_tokens(kwargs: Mapping[str, Any]) -> int | None:
    """Return the number of tokens in the KV cache of a call, None if it has none.

    A static cache counts in a tensor that the call itself advances: the number is read before it.
    """
    for name in CACHE_NAMES:
        length = getattr(kwargs.get(name), "get_seq_length", None)  # the tuples of old models have none
        if length is not None:
            return int(length())
    return None
