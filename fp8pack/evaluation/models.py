"""The models that are compared: a source in floats, and a checkpoint with its weights as stored."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fp8pack.checkpoint.quantized import read_contents
from fp8pack.checkpoint.source import Source, open_checkpoint
from fp8pack.errors import InputError, VerificationError
from fp8pack.modelrun.loader import ModelLoader
from fp8pack.numerics.formats import Float8Format
from fp8pack.runtime.linear import FP8Linear
from fp8pack.runtime.load import load_source
from fp8pack.runtime.model import install, load_rest


@dataclass(frozen=True, slots=True)
class Opened:
    """A checkpoint and its model, whose parameters are loaded by name.

    activations: how inputs of FP8 linears are quantized: `none`, `dynamic` or `static`. kv_scales: the scales of K and
    V that are simulated, by place. release: gives back pages of files.
    """

    source: Source
    loader: ModelLoader
    load: Callable[[Iterable[str]], None]
    activations: str = "none"
    kv_scales: dict[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    release: Callable[[], None] = lambda: None

    @property
    def path(self) -> Path:
        """Where the checkpoint is."""
        return self.source.path

    @property
    def model(self) -> PreTrainedModel:
        """Its model."""
        return self.loader.model

    def check_predicts(self) -> None:
        """Raise InputError if its model predicts no next token."""
        if self.model.config.is_encoder_decoder or self.model.get_output_embeddings() is None:  # type: ignore[no-untyped-call]
            name = self.source.facts.architecture or self.path
            raise InputError(f"{name} predicts no next token, and is no encoder of text that is known")

    def outputs(self, ids: Tensor) -> Any:
        """Run the model on tokens [T]."""
        return self.model(input_ids=ids[None], use_cache=False)

    def logits(self, ids: Tensor) -> Tensor:
        """Return logits [T - 1, V] of the tokens after each position but the last; VerificationError for a NaN."""
        logits: Tensor = self.outputs(ids).logits[0, :-1]
        if not logits.isfinite().all():
            raise VerificationError(
                f"{self.path}: a logit is not a finite number",
                "`fp8pack verify` and `fp8pack inspect` look for the tensor",
            )
        return logits


def open_source(path: Path, dtype: torch.dtype, device: torch.device, *, trust_remote_code: bool) -> Opened:
    """Open a checkpoint whose weights are run in floats."""
    source = open_checkpoint(path)
    loader = ModelLoader(source, trust_remote_code=trust_remote_code, device=device, dtype=dtype)
    for config in (loader.model.config, loader.model.config.get_text_config()):
        config.use_cache = False
    return Opened(source, loader, loader.load)


def open_packed(
    path: Path, dtype: torch.dtype, device: torch.device, activations: str, *, trust_remote_code: bool
) -> Opened:
    """Open a checkpoint whose FP8 weights are run as they are, in FP8 linears.

    With any other kind of quantized weight, all are dequantized.
    Raises:
        InputError: `static` is asked for, and a weight has no scale of its input.
    """
    opened = open_source(path, dtype, device, trust_remote_code=trust_remote_code)
    source, loader = opened.source, opened.loader
    quantized = read_contents(source).quantized.values()
    if not quantized:
        return opened
    if not all(isinstance(found.format, Float8Format) for found in quantized):
        note = f"{path} is not FP8 alone: its weights are dequantized, its activations not quantized"
        return Opened(source, loader, loader.load, notes=(note,))
    packed = load_source(source, device)
    install(loader.model, packed, loader.names)
    declared = packed.activations if activations == "declared" else activations
    if activations != "declared":
        for module in cast("Any", loader.model).modules():
            if isinstance(module, FP8Linear):
                try:
                    module.set_activations(cast("Literal['none', 'dynamic', 'static']", activations))
                except ValueError as error:
                    raise InputError(f"{path}: {error}", "choose --activations dynamic") from None
    kv_scales = {} if activations == "none" else dict(packed.kv_scales)
    load = partial(load_rest, loader, packed)
    return Opened(source, loader, load, declared, kv_scales, release=packed.release_pages)
