"""vLLM in this process: its own loader, watched, and its own forward pass."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from vllm import LLM, SamplingParams
from vllm.config import set_current_vllm_config
from vllm.distributed import (
    destroy_model_parallel,
    ensure_model_parallel_initialized,
    init_distributed_environment,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.utils.network_utils import get_distributed_init_method, get_open_port
from vllm.v1.worker import cpu_worker  # noqa: F401 - the engine imports it for what it makes of torch.accelerator

TOKENS = 128


@dataclass
class Loaded:
    """A model as the engine holds it between loading and processing: parameters, those never written, and kernels."""

    parameters: dict[str, Tensor]
    unwritten: set[str]
    kernels: set[str]
    problem: str = ""  # what the engine raised while it processed them for its kernels


class WatchedLoader(DefaultModelLoader):
    """The engine's loader; every byte of a parameter is 0xFF before it, which is NaN in each format."""

    loaded: Loaded | None = None

    def load_weights(self, model: nn.Module, model_config: object) -> None:
        defaults = {name: tensor.clone() for name, tensor in _tensors(model)}
        for _, tensor in _tensors(model):
            bytes_of(tensor).fill_(0xFF)
        super().load_weights(model, model_config)
        state = {name: tensor.clone() for name, tensor in _tensors(model)}
        unwritten = {name for name, tensor in state.items() if bytes_of(tensor).eq(0xFF).all()}
        self.loaded = Loaded(state, unwritten, set(_kernels(model)))
        for name, tensor in _tensors(model):  # the engine may ask whether a default is still there
            unset = bytes_of(tensor).eq(0xFF).all(-1)
            bytes_of(tensor)[unset] = bytes_of(defaults[name])[unset]


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, and the tensors inside those of torchao, under the names that its files have."""
    for name, parameter in model.named_parameters():
        if hasattr(parameter.data, "__tensor_flatten__"):
            for part in parameter.data.__tensor_flatten__()[0]:
                yield f"{name.removesuffix('weight')}_weight_{part}", getattr(parameter.data, part)
        else:
            yield name, parameter.data


def bytes_of(tensor: Tensor) -> Tensor:
    """Return a view of the bytes of a tensor: [elements, bytes of each]."""
    return tensor.view(-1).view(torch.uint8).view(-1, tensor.element_size())


def _kernels(model: nn.Module) -> Iterator[str]:
    for module in model.modules():
        for holder in (getattr(module, "quant_method", None), getattr(module, "scheme", None)):
            names = [type(value).__name__ for value in vars(holder).values()] if holder is not None else []
            yield from (name for name in names if name.endswith("Kernel"))


def load(folder: Path) -> Loaded:
    """Build the engine's model and load a checkpoint into it; raise what the engine does."""
    arguments = EngineArgs(str(folder), max_model_len=TOKENS, enforce_eager=True, skip_tokenizer_init=True)
    config = arguments.create_engine_config()
    loader = WatchedLoader(config.load_config)
    with set_current_vllm_config(config):
        if not torch.distributed.is_initialized():
            address = get_distributed_init_method("127.0.0.1", get_open_port())
            init_distributed_environment(1, 0, address, 0, "gloo")
        destroy_model_parallel()  # the groups of a model without experts lack those of experts
        ensure_model_parallel_initialized(1, 1)
        try:
            loader.load_model(config, config.model_config)
        except Exception as error:
            if loader.loaded is None:
                raise
            loader.loaded.problem = str(error)
    assert loader.loaded is not None
    return loader.loaded


def logprobs(folder: Path, tokens: list[int]) -> Tensor:
    """Return the log probabilities of every next token [T, vocabulary] in the engine; it generates a few tokens too."""
    llm = LLM(
        str(folder),
        max_model_len=TOKENS,
        max_num_seqs=1,
        max_num_batched_tokens=TOKENS,
        max_logprobs=-1,
        enforce_eager=True,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
    )
    asked = SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=-1, detokenize=False)
    (answer,) = llm.generate([{"prompt_token_ids": tokens}], asked, use_tqdm=False)
    assert len(answer.outputs[0].token_ids) == 4
    return torch.tensor([[row[i].logprob for i in range(len(row))] for row in answer.prompt_logprobs[1:]])
