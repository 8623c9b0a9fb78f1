"""`make_operand`: the GEMM operand of a packed weight."""

from dataclasses import replace

from torch import Tensor

from fp8pack.gemm.choose import choose
from fp8pack.gemm.operand import Operand
from fp8pack.gemm.reference_backend import ReferenceBackend
from fp8pack.gemm.scheme import scheme_of
from fp8pack.numerics.formats import Float8Format
from fp8pack.numerics.granularity import CHANNEL, TENSOR, Granularity


def make_operand(
    payload: Tensor,
    scale: Tensor,
    format: Float8Format,
    granularity: Granularity,
    *,
    input_scale: Tensor | None = None,
    weight_only: bool = False,
) -> Operand:
    """Return a weight, prepared for the backend of its device.

    Shapes: payload [N, K] of an FP8 dtype; scale [ceil(N/R), ceil(K/C)] float32; input_scale of one element, used only
        if activations have one scale per tensor or per token.
    """
    scheme = scheme_of(format, granularity, weight_only=weight_only)
    backend = choose(payload.device, scheme) if payload.numel() else ReferenceBackend()
    operand = backend.prepare(payload, scale, scheme)
    if input_scale is None or input_scale.numel() != 1 or scheme.activation not in (TENSOR, CHANNEL):
        return operand
    return replace(operand, input_scale=input_scale.float().reshape(1))
