"""How FP8 weights are stored and announced: all that an engine sees of a recipe."""

from dataclasses import dataclass

from fp8pack.numerics.formats import Float8Format
from fp8pack.numerics.granularity import Granularity


@dataclass(frozen=True, slots=True)
class Storage:
    """The convention of a checkpoint and what it stores.

    quant_method: `fp8`, `compressed-tensors`, … as `quantization_config` says, or the name of a convention without one.
    activations: `dynamic`, `static` or `none` (weight-only). powers_of_two: every scale is one.
    spelling: which names a method with several uses; empty for its usual ones.
    """

    quant_method: str
    format: Float8Format
    granularity: Granularity
    activations: str
    powers_of_two: bool = False
    kv_cache: bool = False
    spelling: str = ""
