"""What second moments will cost a run, said before it starts."""

import time

import numpy as np

from fp8pack.checkpoint.source import Source
from fp8pack.modelfacts.fused import fused_module
from fp8pack.modelfacts.spec import TensorSpec
from fp8pack.numerics.native import add_moments
from fp8pack.numerics.second_moments import block_of, triangles_shape
from fp8pack.units import format_seconds, format_size

_TOKENS = 512


def cost_of_moments(source: Source, modules: set[str], kind: str, num_tokens: int, per_token: int) -> str:
    """Return a note on the bytes and the seconds of second moments of the inputs of these modules.

    per_token: experts that a token is routed to.
    """
    inputs: dict[str, TensorSpec] = {}
    for spec in source.specs:
        if len(spec.shape) > 1 and spec.name.removesuffix(".weight") in modules:
            inputs.setdefault(fused_module(spec.name) or spec.name, spec)  # q, k and v have one input
    nbytes = products = 0
    for name, spec in inputs.items():
        channels, experts = spec.shape[-1], spec.shape[0] if len(spec.shape) > 2 else 1
        block = block_of(kind, channels)
        blocks, elements = triangles_shape(channels, block)
        nbytes += 8 * experts * blocks * elements
        if ".experts.0." in name or experts > 1:
            products += per_token * blocks * elements
        elif ".experts." not in name:
            products += blocks * elements
    seconds = format_seconds(num_tokens * products * _seconds_of_a_product())
    return f"second moments of {len(inputs)} inputs: {format_size(nbytes)} in the file, about {seconds} on one core"


def _seconds_of_a_product() -> float:
    values, prompts, moments = np.ones((_TOKENS, 128), np.uint16), np.zeros(_TOKENS, np.int32), np.zeros((1, 128, 128))
    add_moments(values, prompts, moments)  # loads, or compiles, the kernel
    started = time.perf_counter()
    add_moments(values, prompts, moments)
    return (time.perf_counter() - started) / (_TOKENS * 128 * 129 / 2)
