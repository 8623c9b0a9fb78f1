"""`import fp8pack.transformers` lets transformers load checkpoints whose `quant_method` is `fp8pack`.

`AutoModelForCausalLM.from_pretrained` then returns a model whose linears and experts run in FP8. Without the import,
transformers does not know the method and loads the bytes of weights without their scales.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fp8pack.checkpoint.source import open_checkpoint
from fp8pack.errors import InputError
from fp8pack.gemm.device import find_device
from fp8pack.modelrun.loader import load_parameters
from fp8pack.modelrun.names import names_of
from fp8pack.modelrun.transformers_internals import (
    HfQuantizer,
    QuantizationConfigMixin,
    register_quantization_config,
    register_quantizer,
)
from fp8pack.runtime.experts import FP8Experts
from fp8pack.runtime.linear import FP8Linear
from fp8pack.runtime.load import load_source
from fp8pack.runtime.model import install, plain
from fp8pack.runtime.packed_checkpoint import PackedCheckpoint
from fp8pack.runtime.packed_tensor import PackedTensor

METHOD = "fp8pack"
_SCALES = r"_scale_inv$|\.(input|k|v)_scale$"  # whatever name transformers gives their weight


@register_quantization_config(METHOD)
class FP8PackConfig(QuantizationConfigMixin):
    """The `quantization_config` of a checkpoint; its entries are ignored, since the files say the same."""

    def __init__(self, quant_method: str = METHOD, **entries: Any) -> None:
        self.quant_method: Any = quant_method
        self.entries = entries

    def to_dict(self) -> dict[str, Any]:
        """Return the entries for config.json."""
        return {"quant_method": self.quant_method, **self.entries}


@register_quantizer(METHOD)
class FP8PackQuantizer(HfQuantizer):
    """Loads the packed layers of a model with `load_packed`; transformers loads everything else."""

    requires_calibration = False

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Raise InputError if the model is to be quantized while it is loaded."""
        if not self.pre_quantized:
            raise InputError("the checkpoint has no FP8 weight", "`fp8pack pack` makes an FP8 checkpoint of it")

    def update_device_map(self, device_map: Any) -> Any:
        """Return one device if transformers is to choose: the GPU, if there is one."""
        if isinstance(device_map, str) and device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
            return {"": torch.device("cuda" if torch.cuda.is_available() else "cpu")}
        return device_map

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, device_map: Any = None, **kwargs: Any
    ) -> None:
        if not checkpoint_files:
            raise InputError("transformers passed no checkpoint files", "give from_pretrained() a directory")
        self._source = open_checkpoint(Path(checkpoint_files[0]).parent)
        self._device = _only_device(device_map)
        packed = load_source(self._source, "meta")
        self._names = names_of(model, packed)
        parameters = dict(model.named_parameters())
        installed = install(model, packed, self._names)
        modules = dict(model.named_modules())
        self._experts = {path: module for path, module in modules.items() if isinstance(module, FP8Experts)}
        within = {inner for experts in self._experts.values() for inner in experts.modules()}
        layers = {path: module for path, module in modules.items() if isinstance(module, FP8Linear)}
        self._layers = {path: layer for path, layer in layers.items() if layer not in within}
        for path in self._experts:
            _replace(model, path, torch.empty_like(parameters[path]))
        for path in self._layers:
            _replace(model, path, _Awaited(parameters[f"{path}.weight"], parameters.get(f"{path}.bias")))
        self._dequantized = [key for key, _ in model.named_parameters() if self._is_packed(packed, key)]
        hidden = {*installed, *(parameters.keys() - dict(model.named_parameters()).keys())}
        patterns = {f"^{re.sub(r'[0-9]+', '[0-9]+', re.escape(name))}$" for name in hidden} | {_SCALES}
        model._keys_to_ignore_on_load_unexpected = patterns.union(model._keys_to_ignore_on_load_unexpected or ())
        dequantized = (name for key in self._dequantized for name in self._names.of_parameter(key))
        self._tensors = sorted({name for name in (*installed, *dequantized) if name in packed})

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        packed: Any = load_source(self._source, self._device, tensors=self._tensors)
        for path, layer in self._layers.items():
            (bias,) = self._names.of_parameter(f"{path}.bias")
            _replace(model, path, FP8Linear(packed[layer.name], packed.get(bias)))
        for path, experts in self._experts.items():
            layers = ([FP8Linear(packed[part.name]) for part in parts] for parts in experts.parts())
            _replace(model, path, FP8Experts(list(layers)))
        # overwrites transformers' result, which is FP8 bytes cast to numbers
        load_parameters(model, self._names, self._dequantized, lambda name: plain(packed[name]), self._device)
        return model

    def _is_packed(self, packed: PackedCheckpoint, parameter: str) -> bool:
        return any(isinstance(packed.get(name), PackedTensor) for name in self._names.of_parameter(parameter))

    def is_serializable(self) -> bool:
        """No: the packed checkpoint exists already."""
        return False

    @property
    def is_trainable(self) -> bool:
        """No: there are no gradients."""
        return False


class _Awaited(nn.Module):
    """The placeholder of a layer while transformers loads the rest: tensors that its initialization may write to."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = torch.empty_like(weight, device="meta")
        self.bias = None if bias is None else torch.empty_like(bias, device="meta")
        self._is_hf_initialized = True


def _only_device(device_map: Any) -> torch.device:
    names = {str(device) for device in (device_map or {"": "cpu"}).values()}
    if len(names) > 1 or names & {"disk", "meta"}:
        raise InputError(
            f"device_map has {', '.join(sorted(names))}, and fp8pack loads a model to one CPU or GPU",
            "device_map='cpu' or device_map='cuda'",
        )
    name = names.pop()
    return find_device(f"cuda:{name}" if name.isdecimal() else name)


def _replace(model: nn.Module, path: str, value: nn.Module | Tensor) -> None:
    """Replace a module, or a tensor that is no parameter, with another."""
    parent, _, leaf = path.rpartition(".")
    module = model.get_submodule(parent)
    delattr(module, leaf)
    setattr(module, leaf, value)
