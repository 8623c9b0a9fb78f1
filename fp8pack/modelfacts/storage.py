"""How FP8 weights are stored and declared: the part of a recipe that an engine sees."""

from dataclasses import dataclass

from fp8pack.numerics.formats import Float8Format
from fp8pack.numerics.granularity import Granularity


@dataclass(frozen=True, slots=True)
class Storage:
    """The quant method of a checkpoint, and its format, granularity and activations.

    quant_method: `fp8`, `compressed-tensors`, … as in `quantization_config`, or the name of a method without one.
    activations: `dynamic`, `static` or `none` (weight-only). powers_of_two: whether every scale is one.
    spelling: which tensor names a method uses that has several; empty for the usual ones.
    """

    quant_method: str
    format: Float8Format
    granularity: Granularity
    activations: str
    powers_of_two: bool = False
    kv_cache: bool = False
    spelling: str = ""
