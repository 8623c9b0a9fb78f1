"""`quant_method: torchao`: Float8Tensor, flattened as torchao 0.18 stores it for transformers and vLLM.

`a.b.weight` becomes `a.b._weight_qdata` [N, K] and `a.b._weight_scale` F32, [N, 1] for channels, [1, 1] for a tensor.
A header's metadata lists the tensors under `tensor_names`, and under each name says as JSON what it is.
"""

import json
from collections.abc import Sequence
from typing import Any

from fp8pack.checkpoint.quant_methods.convention import Convention
from fp8pack.modelfacts.spec import Stored, TensorSpec
from fp8pack.modelfacts.storage import Storage
from fp8pack.numerics.formats import E4M3, Float8Format
from fp8pack.numerics.granularity import CHANNEL, TENSOR, Granularity
from fp8pack.planning.plan import PackPlan, TensorPlan

_FLOAT8 = {"_type": "torch.dtype", "_data": "float8_e4m3fn"}
_AUTO = {"_type": "KernelPreference", "_data": "AUTO"}
_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_MM_CONFIG = {"emulate": False, "use_fast_accum": True, "pad_inner_dim": False}


class TorchAo(Convention):
    """The convention of PyTorch's own quantizer."""

    name = "torchao"

    def expresses(self, storage: Storage) -> bool:
        """Return whether it is e4m3 with channel or tensor scales, activations dynamic or none."""
        known = storage.granularity in (CHANNEL, TENSOR) and storage.activations in ("dynamic", "none")
        return known and storage.format == E4M3

    def payload(self, spec: TensorSpec, format: Float8Format) -> Stored:
        """Return `_weight_qdata`."""
        return Stored(f"{_flattened(spec.name)}_qdata", format.dtype, spec.shape)

    def scale(self, spec: TensorSpec, granularity: Granularity) -> Stored:
        """Return `_weight_scale`, of two dimensions."""
        return Stored(f"{_flattened(spec.name)}_scale", "F32", granularity.scale_shape(spec.shape))

    def metadata(self, tensors: Sequence[TensorPlan], storage: Storage) -> dict[str, str]:
        """Return what each tensor is: of all files in each, since transformers takes the names that it reads last."""
        names = [tensor.spec.name for tensor in tensors]
        about = {tensor.spec.name: json.dumps(_entry(tensor, storage)) for tensor in tensors}
        return {"tensor_names": json.dumps(names), **about}

    def config(self, plan: PackPlan) -> dict[str, Any]:
        """Return the keys of transformers' TorchAoConfig."""
        return {
            "quant_method": "torchao",
            "quant_type": {"default": _quant_type(plan.recipe.storage)},
            "modules_to_not_convert": list(plan.ignored_modules),
            "include_input_output_embeddings": False,
            "untie_embedding_weights": False,
        }


def _flattened(name: str) -> str:
    parent, _, leaf = name.rpartition(".")
    return f"{parent}._{leaf}" if parent else f"_{leaf}"


def _entry(tensor: TensorPlan, storage: Storage) -> dict[str, Any]:
    packing = tensor.packing
    if packing is None:
        return {"_type": "Tensor"}
    dynamic = {
        "float8_dtype": _FLOAT8,
        "granularity": _granularity(storage),
        "mm_config": None,
        "hp_value_lb": None,
        "hp_value_ub": None,
        "kernel_preference": _AUTO,
    }
    weight_only = storage.activations == "none"
    dtype = "bfloat16" if tensor.quantized else _DTYPES[tensor.spec.dtype]
    data = {
        "block_size": list(packing.granularity.region(tensor.spec.shape)),
        "mm_config": None if weight_only else {"_type": "Float8MMConfig", "_data": _MM_CONFIG},
        "act_quant_kwargs": None if weight_only else {"_type": "QuantizeTensorToFloat8Kwargs", "_data": dynamic},
        "kernel_preference": _AUTO,
        "dtype": {"_type": "torch.dtype", "_data": dtype},
    }
    return {"_type": "Float8Tensor", "_data": data, "_tensor_data_names": ["qdata", "scale"]}


def _quant_type(storage: Storage) -> dict[str, Any]:
    """The configuration object that would have made such weights, as torchao encodes it."""
    granularity = {**_granularity(storage), "_version": 1}
    if storage.activations == "none":
        data: dict[str, Any] = {"granularity": granularity, "set_inductor_config": True, "weight_dtype": _FLOAT8}
        return {"_type": "Float8WeightOnlyConfig", "_version": 2, "_data": data}
    data = {
        "activation_dtype": _FLOAT8,
        "activation_value_lb": None,
        "activation_value_ub": None,
        "alg_id": 0,
        "granularity": [granularity, granularity],
        "kernel_preference": _AUTO,
        "mm_config": {"_type": "Float8MMConfig", "_version": 1, "_data": _MM_CONFIG},
        "packing_format": {"_type": "Float8PackingFormat", "_data": "PLAIN"},
        "set_inductor_config": True,
        "weight_dtype": _FLOAT8,
    }
    return {"_type": "Float8DynamicActivationFloat8WeightConfig", "_version": 2, "_data": data}


def _granularity(storage: Storage) -> dict[str, Any]:
    if storage.granularity == CHANNEL:
        return {"_type": "PerRow", "_data": {"dim": -1}}
    return {"_type": "PerTensor", "_data": {}}
