"""The scales of an FP8 GEMM: the granularity of the weight and of the activations."""

from dataclasses import dataclass

from fp8pack.numerics.formats import Float8Format
from fp8pack.numerics.granularity import BLOCK_128, CHANNEL, MX, TENSOR, Granularity

GROUP_128 = Granularity("group:128", 1, 128)


@dataclass(frozen=True, slots=True)
class GemmScheme:
    """The formats and granularities of both operands.

    granularity: of the weight [N, K]. activation: of the input activations [M, K], as a matrix: `channel` is one scale
    per token; None if they are not quantized.
    """

    format: Float8Format
    granularity: Granularity
    activation: Granularity | None

    def __str__(self) -> str:
        return self.describe(static=False)

    def describe(self, *, static: bool) -> str:
        """Return the scheme as text; static: activations have one calibrated scale."""
        activation = "not quantized" if self.activation is None else _SPOKEN.get(self.activation.name, "1x128")
        return f"{self.format.name} {self.granularity}, activations {'static' if static else activation}"


_SPOKEN = {"tensor": "per tensor", "channel": "per token", "mx": "MX 1x32"}


def scheme_of(format: Float8Format, granularity: Granularity, *, weight_only: bool = False) -> GemmScheme:
    """Return the scheme of a weight: activations have the granularity that kernels support with the weight's.

    For groups and blocks that is 1x128; one scale per token if the weight's regions are not a multiple of 128 columns.
    """
    if weight_only:
        return GemmScheme(format, granularity, None)
    if granularity in (TENSOR, CHANNEL, MX):
        return GemmScheme(format, granularity, granularity)
    cols = granularity.cols
    return GemmScheme(format, granularity, GROUP_128 if cols is not None and cols % 128 == 0 else CHANNEL)


TRIED_GRANULARITIES = (
    TENSOR,
    CHANNEL,
    BLOCK_128,
    MX,
    GROUP_128,
    Granularity("group:64", 1, 64),
)  # that `fp8pack env` tries
