"""`import fp8pack.transformers` lets transformers load checkpoints whose `quant_method` is `fp8pack`.

`AutoModelForCausalLM.from_pretrained` then gives a model whose linears and experts run in FP8. Without it, transformers
would not know the method, and would load the bytes of weights without their scales.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from fp8pack.errors import InputError
from fp8pack.models.names import names_of
from fp8pack.runtime.experts import FP8Experts
from fp8pack.runtime.linear import FP8Linear
from fp8pack.runtime.load import load_packed
from fp8pack.runtime.model import install

METHOD = "fp8pack"
_SCALES = r"_scale_inv$|\.(input|k|v)_scale$"  # under whatever name transformers gives their weight


@register_quantization_config(METHOD)
class FP8PackConfig(QuantizationConfigMixin):
    """The `quantization_config` of a checkpoint; what it says is read from the files themselves."""

    def __init__(self, quant_method: str = METHOD, **entries: Any) -> None:
        self.quant_method: Any = quant_method
        self.entries = entries

    def to_dict(self) -> dict[str, Any]:
        """Return the entries as config.json has them."""
        return {"quant_method": self.quant_method, **self.entries}


@register_quantizer(METHOD)
class FP8PackQuantizer(HfQuantizer):
    """Leaves the packed layers of a model to `load_packed`, everything else to transformers."""

    requires_calibration = False

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Raise InputError if a BF16 model is to be quantized: `fp8pack pack` does that."""
        if not self.pre_quantized:
            raise InputError("this checkpoint is not packed: `fp8pack pack` packs it")

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, device_map: Any = None, **kwargs: Any
    ) -> None:
        if not checkpoint_files:
            raise InputError("transformers named no files to load from")
        self._path = Path(checkpoint_files[0]).parent
        self._device = _only_device(device_map)
        packed = load_packed(self._path, "meta")
        self._names = names = names_of(model, packed)
        known = set(model.state_dict())
        held = install(model, packed, names)
        self._tensors = sorted(name for name in held if name in packed)
        self._layers: dict[str, FP8Linear | FP8Experts] = {}
        for path, module in list(model.named_modules()):
            within = any(path.startswith(f"{outer}.") for outer in self._layers)
            if isinstance(module, FP8Linear | FP8Experts) and not within:
                self._layers[path] = module
                _replace(model, path, nn.Module())
                # or transformers would initialize the weights that it does not find there
                vars(model.get_submodule(path.rpartition(".")[0]))["_is_hf_initialized"] = True
        hidden = [*held, *(known - set(model.state_dict()))]
        ignored = {f"^{re.escape(name)}$" for name in hidden} | {_SCALES}
        model._keys_to_ignore_on_load_unexpected = ignored.union(model._keys_to_ignore_on_load_unexpected or ())

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        packed: Any = load_packed(self._path, self._device, tensors=self._tensors)
        for path, layer in self._layers.items():
            if isinstance(layer, FP8Linear):
                (bias,) = self._names.of_parameter(f"{path}.bias")
                _replace(model, path, FP8Linear(packed[layer.packed.name], packed.get(bias)))
            else:
                experts = ([FP8Linear(packed[part.packed.name]) for part in parts] for parts in layer.parts())
                _replace(model, path, FP8Experts(list(experts)))
        return model

    def is_serializable(self) -> bool:
        """No: the packed checkpoint is there already."""
        return False

    @property
    def is_trainable(self) -> bool:
        """No: there are no gradients."""
        return False


def _only_device(device_map: Any) -> torch.device:
    devices = {torch.device(device) for device in (device_map or {"": "cpu"}).values()}
    if len(devices) > 1:
        raise InputError(f"fp8pack loads a model to one device, not to {len(devices)}: name one in device_map")
    return devices.pop()


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
