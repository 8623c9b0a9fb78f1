"""FP8 activations in float32 on any device: what a W8A8 GEMM computes, so that its quality is measured without FP8.

An FP8 GEMM multiplies FP8 values exactly, adds in float32 and multiplies by both scales. Here the same numbers are
multiplied in float32, dequantized first: what differs is the order of additions, some 2^-20 of the result.
tests/numerics/test_simulate.py holds it against float64.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fp8pack.numerics import torch_codec
from fp8pack.numerics.formats import E4M3, Float8Format
from fp8pack.numerics.replaced_forwards import replaced_forwards


@dataclass(frozen=True, slots=True)
class Dynamic:
    """A scale for each token, or for each `group` of its channels: 128 is what block-wise FP8 GEMMs take."""

    group: int | None = None
    format: Float8Format = E4M3


@dataclass(frozen=True, slots=True)
class Static:
    """One scale for all tokens, a multiplier in float32; what lies beyond it saturates."""

    scale: float
    format: Float8Format = E4M3


Activation = Dynamic | Static


def round_activations(x: Tensor, activation: Activation) -> Tensor:
    """Return x as an FP8 GEMM sees it: quantized and dequantized.

    Shapes: x [..., K] in any float dtype; the result is float32 of the same shape.
    Numerics: as `torch_codec.quantize`, with scale = max(amax / max, 2^-126) in float32.
    Raises:
        ValueError: x holds a NaN or infinity.
    """
    rows = x.reshape(-1, x.shape[-1]).float()
    if rows.numel() == 0:
        return x.float()
    match activation:
        case Dynamic(group):
            region, scales = (1, group or rows.shape[1]), None
        case Static(scale):
            region, scales = (rows.shape[0], rows.shape[1]), torch.full((1, 1), scale, device=x.device)
    payload, used = torch_codec.quantize(rows, region, format=activation.format, scales=scales)
    return torch_codec.dequantize(payload, used, region).reshape(x.shape)


@contextmanager
def simulated(model: nn.Module, linears: Mapping[str, tuple[Tensor, Activation]]) -> Iterator[None]:
    """Let linears of a model compute as FP8 GEMMs would, while this lasts.

    linears: from the path of an nn.Linear to its dequantized weight [N, K], float32, and how its input is rounded.
    The result of each is rounded to the dtype of its input, as the epilogue of a GEMM does.
    """
    modules = [(model.get_submodule(path), simulation) for path, simulation in linears.items()]
    with replaced_forwards((module, _forward(module, *simulation)) for module, simulation in modules):
        yield


def _forward(module: nn.Module, weight: Tensor, activation: Activation) -> Callable[[Tensor], Tensor]:
    bias = module._parameters.get("bias")

    def forward(x: Tensor) -> Tensor:
        product = nn.functional.linear(round_activations(x, activation), weight, None if bias is None else bias.float())
        return product.to(x.dtype)

    return forward
