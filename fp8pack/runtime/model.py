"""`load_model`: a transformers model with FP8 linears, for any checkpoint that `load_packed` reads."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from fp8pack.checkpoint.source import open_checkpoint
from fp8pack.errors import InputError, RecipeError
from fp8pack.gemm.device import find_device
from fp8pack.modelrun.loader import ModelLoader, load_parameters, quiet_transformers
from fp8pack.modelrun.names import Names
from fp8pack.modelrun.transformers_internals import is_experts
from fp8pack.runtime.experts import FP8Experts
from fp8pack.runtime.linear import FP8Linear
from fp8pack.runtime.load import load_source
from fp8pack.runtime.packed_checkpoint import PackedCheckpoint
from fp8pack.runtime.packed_tensor import PackedTensor


def load_model(
    path: str | Path,
    device: str | torch.device = "cpu",
    *,
    verify: bool = False,
    workers: int | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Return the transformers model of a packed checkpoint, ready for `generate()`.

    Packed linears and experts run in FP8 (`FP8Linear`, `FP8Experts`), everything else in BF16. An FP8 weight that the
    class uses in another way is dequantized; `report_fp8` counts them. `model.kv_scales` are the scales of K and V, as
    in PackedCheckpoint. verify, workers: as in `load_packed`. trust_remote_code: allow custom modeling code from the
    checkpoint.
    Raises:
        InputError: as `load_packed` does; or transformers does not know the architecture, or it needs custom modeling
            code and `trust_remote_code` is off.
        VerificationError, DeviceError, RecipeError: as `load_packed` does.
    """
    target = find_device(device)
    if target.type == "meta":
        raise RecipeError("a model on the meta device has no weights", "use --device cpu or --device cuda")
    source = open_checkpoint(Path(path))
    with quiet_transformers():
        loader = ModelLoader(source, trust_remote_code=trust_remote_code, device=target)
    packed = load_source(source, target, verify=verify, workers=workers)
    model = make_fp8_model(loader, packed)
    if (source.directory / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(source.directory, local_files_only=True)
    vars(model)["save_pretrained"] = _refuse_to_save
    return model


def make_fp8_model(loader: ModelLoader, packed: PackedCheckpoint) -> PreTrainedModel:
    """Return the model of a loader with FP8 layers, everything else loaded in the loader's dtype."""
    install(loader.model, packed, loader.names)
    load_rest(loader, packed, loader.model.state_dict())
    return loader.model.requires_grad_(False)


def load_rest(loader: ModelLoader, packed: PackedCheckpoint, parameters: Iterable[str]) -> None:
    """Load those of a model's parameters that are no FP8 layers' and not loaded yet, in the loader's dtype."""
    model = loader.model
    rest = [name for name in parameters if model.get_parameter_or_buffer(name).is_meta]
    with quiet_transformers():
        load_parameters(
            model, loader.names, rest, lambda name: plain(packed[name], loader.dtype), loader.device, loader.dtype
        )


def _refuse_to_save(*args: object, **kwargs: object) -> NoReturn:
    raise InputError(
        "transformers cannot save a model with FP8 layers", "copy the packed checkpoint, or `fp8pack unpack` it"
    )


def install(model: PreTrainedModel, packed: PackedCheckpoint, names: Names) -> set[str]:
    """Replace the packed linears and experts of a model with FP8 layers; return their tensors' names in the checkpoint.

    Raises:
        InputError: the class does not merge experts that the checkpoint stores one by one.
    """
    installed: set[str] = set()
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            installed |= set() if _needs_float32(model, path) else _install_linear(model, path, module, packed, names)
        elif is_experts(module):
            installed |= _install_experts(path, module, packed, names)
            _check_experts(model, path, module, names)
    if any(isinstance(module, FP8Experts) for module in model.modules()):
        model.set_experts_implementation("eager")  # the one that indexes experts one at a time
    vars(model)["kv_scales"] = packed.kv_scales
    return installed


def _needs_float32(model: PreTrainedModel, path: str) -> bool:
    """Whether the class needs a linear in float32: such code reads the weight's dtype, as T5's does for `wo`."""
    names = [*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())]
    return any(re.search(rf"(^|\.){name}($|\.)", path) for name in names)


def _check_experts(model: nn.Module, path: str, experts: nn.Module, names: Names) -> None:
    for leaf, _ in experts.named_parameters(recurse=False):
        if f"{path}.{leaf}" not in names.tensors:
            raise InputError(
                f"{type(model).__name__} does not make {path}.{leaf} of one tensor per expert, as the checkpoint "
                "stores them",
                "serve it with an engine, or pack with --ignore '*experts*'",
            )


def _install_linear(model: nn.Module, path: str, linear: nn.Linear, packed: PackedCheckpoint, names: Names) -> set[str]:
    found = [packed.get(name) for name in names.of_parameter(f"{path}.weight")]
    weight = found[0] if len(found) == 1 else None
    if not isinstance(weight, PackedTensor) or weight.shape != linear.weight.shape:
        return set()
    bias = None
    if linear.bias is not None:
        (name,) = names.of_parameter(f"{path}.bias")
        bias = plain(packed[name])
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, FP8Linear(weight, bias))
    return {*names.of_parameter(f"{path}.weight"), *(names.of_parameter(f"{path}.bias") if bias is not None else ())}


def _install_experts(path: str, module: nn.Module, packed: PackedCheckpoint, names: Names) -> set[str]:
    """Experts [E, N, K]; those that are stored transposed, or used in another way, are not replaced."""
    installed: set[str] = set()
    if getattr(module, "is_transposed"):  # noqa: B009  (a mark of transformers' decorator, no attribute of nn.Module)
        return installed
    for leaf, parameter in list(module.named_parameters(recurse=False)):
        if parameter.ndim != 3:
            continue
        experts = list(_experts_of(f"{path}.{leaf}", parameter, packed, names))
        if len(experts) == parameter.shape[0]:
            delattr(module, leaf)
            setattr(module, leaf, FP8Experts([[FP8Linear(part) for part in parts] for parts in experts]))
            installed |= set(names.of_parameter(f"{path}.{leaf}"))
    return installed


def _experts_of(
    path: str, parameter: nn.Parameter, packed: PackedCheckpoint, names: Names
) -> Iterator[list[PackedTensor]]:
    """The weights of each expert of a 3-D parameter, if they are packed and their shapes match."""
    stored = names.of_parameter(path)
    count, n, k = parameter.shape
    whole = packed.get(stored[0]) if len(stored) == 1 else None
    if isinstance(whole, PackedTensor) and whole.shape == parameter.shape:
        yield from ([expert] for expert in split_experts(whole))
        return
    for modules in names.of_experts(path, count):
        parts = [packed.get(f"{module}.weight") for module in modules]
        found = [part for part in parts if isinstance(part, PackedTensor)]
        if len(found) != len(parts) or sum(part.shape[0] for part in found) != n or found[0].shape[1] != k:
            return
        yield found


def split_experts(whole: PackedTensor) -> Iterator[PackedTensor]:
    """Yield the weights [N, K] of a fused one [E, N, K]; nothing if a scale region spans experts."""
    count, n, k = whole.shape
    rows, cols = whole.block
    if whole.stored_scale.numel() == 1:
        for i in range(count):
            yield replace(whole, name=f"{whole.name}[{i}]", qdata=whole.qdata[i], block=(n, k))
        return
    if n % rows:
        return
    per_expert, granularity = n // rows, whole.granularity
    if (rows, cols) == (n, k):
        granularity = "tensor"
    for i, scale in enumerate(whole.scale.split(per_expert)):  # type: ignore[no-untyped-call]
        expert = replace(whole, name=f"{whole.name}[{i}]", qdata=whole.qdata[i], stored_scale=scale, tiled=False)
        yield replace(expert, granularity=granularity)


def plain(tensor: PackedTensor | Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return a tensor of a checkpoint, dequantized if it is packed."""
    return tensor.dequantize(dtype) if isinstance(tensor, PackedTensor) else tensor
