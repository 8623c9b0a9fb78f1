"""A transformers model of a checkpoint: built without weights, which are loaded by name, all or some at a time."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from fp8pack.checkpoint.quantized import read_contents
from fp8pack.checkpoint.source import Source
from fp8pack.checkpoint.values import ValueReader
from fp8pack.errors import InputError, RecipeError
from fp8pack.modelfacts.believable import unbelievable
from fp8pack.modelfacts.contents import Contents
from fp8pack.modelfacts.spec import TensorSpec
from fp8pack.modelrun.names import Names, names_of
from fp8pack.modelrun.transformers_internals import (
    get_class_from_dynamic_module,
    load_tensors,
    make_model,
    no_init_weights,
)
from fp8pack.numerics.replaced_forwards import replaced_forwards
from fp8pack.numerics.torch_dtypes import TORCH_DTYPES

_DEFAULT_LENGTH = 2048
_STRIP_ROWS = 1024  # of an FP8 weight that are dequantized at a time


class ModelLoader:
    """The model of a checkpoint, in evaluation mode, with parameters on the meta device until they are loaded.

    dtype: of its parameters; FP8 weights are dequantized in float32 and rounded once.
    Raises:
        InputError: transformers does not know the architecture, or it needs custom modeling code that is not allowed.
    """

    def __init__(
        self,
        source: Source,
        *,
        trust_remote_code: bool,
        device: torch.device,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self._source, self.device, self.dtype = source, device, dtype
        if reason := unbelievable(source.config or {}, source.specs):
            raise InputError(f"config.json of {source.path} {reason}")
        config = _read_config(source, trust_remote_code)
        model_class = _find_class(source, config, trust_remote_code)
        text = config.get_text_config()
        self.max_positions = int(getattr(text, "max_position_embeddings", 0) or 0)
        self.hidden_nbytes = 4 * int(getattr(text, "hidden_size", 0) or 0)  # of a token, at most float32
        config.quantization_config = None
        self.model = _build(source, model_class, config, dtype)
        self.model.eval()  # type: ignore[no-untyped-call]
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module.register_buffer(
                    name, buffer.to(device), persistent=name not in module._non_persistent_buffers_set
                )
        self._contents = read_contents(source)
        self._specs = {spec.name: spec for spec in self._contents.tensors}
        self.names = names_of(self.model, self._specs)

    def length(self, asked: int | None) -> int:
        """Return the tokens of a run: as asked, or the model's limit, at most 2048; RecipeError if it has fewer."""
        length = asked or min(_DEFAULT_LENGTH, self.max_positions or _DEFAULT_LENGTH)
        if self.max_positions and length > self.max_positions:
            raise RecipeError(
                f"max length {length} exceeds the {self.max_positions} positions of the model",
                f"use --max-length {self.max_positions} or less",
            )
        return length

    @property
    def weight_nbytes(self) -> int:
        """Bytes of all parameters."""
        return sum(parameter.nbytes for parameter in self.model.parameters())

    def load(self, parameters: Iterable[str]) -> None:
        """Load parameters and buffers of these names from the checkpoint, FP8 weights dequantized.

        Raises:
            InputError: the checkpoint does not have one, or has it in another shape.
        """
        load_parameters(self.model, self.names, parameters, self._lazy, self.device, self.dtype)

    def _lazy(self, name: str) -> "_Lazy":
        return _Lazy(self._source, self._contents, self._specs[name], self.dtype)

    def check_tokens(self, prompts: Mapping[str, Sequence[int]]) -> None:
        """Raise InputError if a prompt has a token that the model has no embedding for."""
        embeddings = self.model.get_input_embeddings()
        count = embeddings.num_embeddings if isinstance(embeddings, nn.Embedding) else math.inf
        for name, ids in prompts.items():
            if max(ids) >= count:
                raise InputError(
                    f"{name} has token {max(ids)}, and the model has {count} embeddings: the tokenizer is of another "
                    "model",
                    "copy the tokenizer files of this model into its directory",
                )

    @contextmanager
    def without_logits(self) -> Iterator[None]:
        """Skip the GEMM of the last linear within this context: its input is recorded, its output is not needed."""
        head = self.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        with replaced_forwards([] if head is None else [(head, lambda hidden: hidden[..., :1])]):
            yield

    def load_all(self) -> None:
        """Load every parameter; raises as `load` does."""
        self.load(self.model.state_dict())


def load_parameters(
    model: PreTrainedModel,
    names: Names,
    parameters: Iterable[str],
    read: Callable[[str], Any],
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Set parameters and buffers of a model from the checkpoint's tensors, converted by transformers' rules.

    read: returns a tensor of the checkpoint, or an object that returns it when it is indexed.
    Raises:
        InputError: the checkpoint does not have one, or has it in another shape.
    """
    wanted, architecture = set(parameters), type(model).__name__
    tensors = {name: read(name) for key in wanted for name in names.tensors.get(key, ())}
    info = load_tensors(model, tensors, device, dtype)
    for name, found, expected in info.mismatched_keys:
        raise InputError(f"{name} has shape {list(found)} in the checkpoint and {list(expected)} in {architecture}")
    for name, problem in info.conversion_errors.items():
        raise InputError(f"{name} cannot be loaded into {architecture}: {problem.strip().splitlines()[-1]}")
    model.tie_weights()
    missing = [name for name in wanted if model.get_parameter_or_buffer(name).is_meta]
    if missing:
        raise InputError(f"the checkpoint has no {min(missing)}, which {architecture} needs")


def _build(source: Source, model_class: Any, config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a configuration, its parameters on the meta device."""
    try:
        with no_init_weights(), _parameters_on_meta():
            return make_model(model_class, config, dtype)
    except Exception as error:  # classes raise any type for a wrong configuration
        raise InputError(
            f"{source.path}/config.json: {model_class.__name__} cannot be built from it: {_short(error)}"
        ) from error


def read_tokenizer(source: Source, *, trust_remote_code: bool) -> Any:
    """Return the tokenizer of a checkpoint; InputError if transformers cannot load one."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source.directory, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:  # tokenizers raise any type
        raise InputError(f"{source.path} has no tokenizer that transformers can load: {_short(error)}") from None
    if set(tokenizer.get_vocab().values()) <= set(tokenizer.all_special_ids):  # transformers returns an empty one
        raise InputError(f"{source.path} has no tokenizer", "copy the tokenizer files of this model into it")
    return tokenizer


def _read_config(source: Source, trust_remote_code: bool) -> Any:
    if source.config is None:
        raise InputError(
            f"{source.path} has no config.json, so its architecture is unknown",
            "run it in your own loop inside `with fp8pack.observe(model)`",
        )
    try:
        return AutoConfig.from_pretrained(source.directory, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # configurations raise any type
        if "trust_remote_code" in str(error):
            raise _untrusted(source) from None
        raise InputError(f"{source.path}/config.json cannot be loaded by transformers: {_short(error)}") from None


def _untrusted(source: Source) -> InputError:
    return InputError(
        f"{source.path} needs its custom modeling code", "review that code, then allow it with --trust-remote-code"
    )


def _find_class(source: Source, config: Any, trust_remote_code: bool) -> Any:
    """The class that config.json names: the names of the tensors are its names."""
    architecture = source.facts.architecture
    remote = {reference.rpartition(".")[2]: reference for reference in _references(config)}
    if trust_remote_code and architecture in remote:
        return get_class_from_dynamic_module(remote[architecture], str(source.directory), local_files_only=True)
    found = vars(transformers).get(architecture) or getattr(transformers, architecture or "-", None)
    if isinstance(found, type) and issubclass(found, PreTrainedModel) and found is not PreTrainedModel:
        return found
    if architecture in remote:
        raise _untrusted(source)
    if not architecture:
        raise InputError(f"{source.path}/config.json names no architecture", "add `architectures` to it")
    raise InputError(
        f"transformers {transformers.__version__} has no {architecture}",
        "update transformers, or run the model in your own loop inside `with fp8pack.observe(model)`",
    )


def _references(config: Any) -> list[str]:
    auto_map = getattr(config, "auto_map", None) or {}
    return [reference for reference in auto_map.values() if isinstance(reference, str)]


class _Lazy:
    """A tensor of the checkpoint, read when transformers needs it; not mapped, so that its memory is freed."""

    def __init__(self, source: Source, contents: Contents, spec: TensorSpec, dtype: torch.dtype) -> None:
        self._source, self._contents, self._spec, self._dtype = source, contents, spec, dtype

    def __getitem__(self, index: object) -> Tensor:
        spec = self._spec
        if spec.name not in self._contents.quantized:
            return self._read()
        rows = spec.matrix[0]
        values = torch.empty(spec.shape, dtype=self._dtype)
        with ValueReader(self._source, self._contents) as reader:
            for lo in range(0, rows, _STRIP_ROWS):
                strip = torch.from_numpy(reader.values(spec, lo, min(lo + _STRIP_ROWS, rows)))
                values.view(rows, -1)[lo : lo + _STRIP_ROWS] = strip
        return values

    def _read(self) -> Tensor:
        spec = self._spec
        if spec.dtype not in TORCH_DTYPES:
            raise InputError(f"{spec.file}: tensor {spec.name!r} is {spec.dtype}, a dtype that torch does not have")
        tensor = torch.empty(spec.shape, dtype=TORCH_DTYPES[spec.dtype])
        if spec.nbytes:
            with closing(self._source.open_file(spec.file)) as reader:
                reader.readinto(tensor.view(-1).view(torch.uint8).numpy().data, spec.begin)
        return tensor


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Suppress transformers' warnings and progress bars."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Create parameters on the meta device while a model is built; buffers keep their values."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        empty = None if parameter is None else nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, empty)

    nn.Module.register_parameter = register_on_meta  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
