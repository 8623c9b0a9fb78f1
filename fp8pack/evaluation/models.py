"""The models that are compared: a source in floats, and a checkpoint with its weights as stored."""

from pathlib import Path
from typing import Any, Literal, cast

import torch
from transformers import PreTrainedModel

from fp8pack.checkpoint.quantized import read_contents
from fp8pack.checkpoint.source import Source, open_checkpoint
from fp8pack.errors import InputError
from fp8pack.modelrun.loader import ModelLoader
from fp8pack.numerics.formats import Float8Format
from fp8pack.runtime.linear import FP8Linear
from fp8pack.runtime.load import load_source
from fp8pack.runtime.model import make_fp8_model


def open_loader(
    path: Path, dtype: torch.dtype, device: torch.device, *, trust_remote_code: bool
) -> tuple[Source, ModelLoader]:
    """Return an open checkpoint and the loader of its model; InputError if that predicts no next token."""
    source = open_checkpoint(path)
    loader = ModelLoader(source, trust_remote_code=trust_remote_code, device=device, dtype=dtype)
    if loader.model.config.is_encoder_decoder or loader.model.get_output_embeddings() is None:  # type: ignore[no-untyped-call]
        raise InputError(f"{source.facts.architecture or path} predicts no next token: only such models are evaluated")
    return source, loader


def load(loader: ModelLoader, source: Source, activations: str) -> tuple[PreTrainedModel, str, list[str]]:
    """Load a checkpoint; return its model, how activations are quantized (`none`, `dynamic`, `static`), and notes.

    FP8 weights stay as they are, in FP8 linears; with any other kind of quantized weight, all are dequantized.

    Raises:
        InputError: `static` is asked for, and a weight has no scale of its input.
    """
    quantized = read_contents(source).quantized.values()
    if not quantized or not all(isinstance(found.format, Float8Format) for found in quantized):
        loader.load_all()
        notes = [f"{source.path} is not FP8 alone: its weights are dequantized, its activations not quantized"]
        return loader.model, "none", notes if quantized else []
    packed = load_source(source, loader.device)
    model = make_fp8_model(loader, packed)
    notes = [f"the FP8 KV cache of {source.path} is not simulated"] if packed.kv_scales else []
    if activations == "declared":
        return model, packed.activations, notes
    for module in cast("Any", model).modules():
        if isinstance(module, FP8Linear):
            try:
                module.set_activations(cast("Literal['none', 'dynamic', 'static']", activations))
            except ValueError as error:
                raise InputError(f"{source.path}: {error}", "choose --activations dynamic") from None
    return model, activations, notes
