"""From hidden states to one embedding of a text, as modules.json of a sentence-transformers model says.

Source: https://sbert.net/docs/package_reference/sentence_transformer/models.html (Pooling, Dense, Normalize).
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fp8pack.errors import InputError
from fp8pack.regular_files import read_regular

Pool = Callable[[Tensor], Tensor]  # hidden states [T, H] to an embedding

_MODES: dict[str, Pool] = {
    "cls": lambda hidden: hidden[0],
    "mean": lambda hidden: hidden.mean(0),
    "max": lambda hidden: hidden.amax(0),
    "mean_sqrt_len": lambda hidden: hidden.sum(0) / hidden.shape[0] ** 0.5,
    "lasttoken": lambda hidden: hidden[-1],
}
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_lasttoken": "lasttoken",
}
_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "Identity": nn.Identity,
    "Tanh": nn.Tanh,
    "ReLU": nn.ReLU,
    "GELU": nn.GELU,
}


def read_pooling(directory: Path, device: torch.device) -> tuple[Pool, str]:
    """Return the function that makes an embedding, and its name: mean of all tokens if there is no modules.json.

    Raises:
        InputError: a module is malformed, or of a kind that is not known.
    """
    if not (directory / "modules.json").is_file():
        return _MODES["mean"], "mean"
    steps: list[Pool] = []
    names: list[str] = []
    for module in _read(directory / "modules.json", list):
        kind, folder = str(module.get("type", "")).rpartition(".")[2], directory / str(module.get("path", ""))
        if not folder.resolve().is_relative_to(directory.resolve()):
            raise InputError(f"{directory}/modules.json names a folder outside of it")
        match kind:
            case "Transformer":
                continue
            case "Pooling":
                modes = _modes(_read(folder / "config.json", dict), folder)
                steps.append(lambda hidden, modes=modes: torch.cat([_MODES[mode](hidden) for mode in modes]))  # type: ignore[misc]
                names.append("+".join(modes))
            case "Dense":
                steps.append(_dense(folder, device))
                names.append("dense")
            case "Normalize":
                steps.append(lambda embedding: nn.functional.normalize(embedding, dim=0))
            case _:
                raise InputError(f"{directory}/modules.json has a module of the kind {kind!r}, which is not known")

    def pool(hidden: Tensor) -> Tensor:
        for step in steps:
            hidden = step(hidden)
        return hidden

    return pool, ", ".join(names)


def _modes(config: dict[str, Any], folder: Path) -> list[str]:
    named = config.get("pooling_mode")
    modes = [named] if isinstance(named, str) else list(named or ())
    modes += [mode for flag, mode in _FLAGS.items() if config.get(flag) is True]
    if not modes or not set(modes) <= _MODES.keys():
        raise InputError(
            f"{folder}/config.json has a pooling that is not known: {', '.join(map(str, modes)) or 'none'}"
        )
    return modes


def _dense(folder: Path, device: torch.device) -> Pool:
    config = _read(folder / "config.json", dict)
    kind = str(config.get("activation_function", "Identity")).rpartition(".")[2]
    if kind not in _ACTIVATIONS:
        raise InputError(f"{folder}/config.json has the activation {kind!r}, which is not known")
    try:
        tensors = load_file(folder / "model.safetensors", device=str(device))
    except Exception as error:  # safetensors raises its own and OSError
        raise InputError(f"{folder}/model.safetensors cannot be read: {' '.join(str(error).split())[:100]}") from None
    weight, bias = tensors.get("linear.weight"), tensors.get("linear.bias")
    if weight is None:
        raise InputError(f"{folder}/model.safetensors has no linear.weight")
    activate = _ACTIVATIONS[kind]()
    offset = None if bias is None else bias.float()
    matrix = weight.float()
    return lambda embedding: activate(nn.functional.linear(embedding, matrix, offset))


def _read(path: Path, kind: type) -> Any:
    try:
        found = json.loads(read_regular(path))
    except (ValueError, RecursionError):
        raise InputError(f"{path} is no JSON") from None
    if not isinstance(found, kind):
        raise InputError(f"{path} is malformed")
    return found
