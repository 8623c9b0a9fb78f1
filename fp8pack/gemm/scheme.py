"""How an FP8 GEMM is scaled: what region of the weight shares a scale, and what of the activation."""

from dataclasses import dataclass

from fp8pack.numerics.formats import Float8Format
from fp8pack.numerics.granularity import BLOCK_128, CHANNEL, MX, TENSOR, Granularity

GROUP_128 = Granularity("group:128", 1, 128)


@dataclass(frozen=True, slots=True)
class GemmScheme:
    """The formats and scales of both operands.

    granularity: of the weight [N, K]. activation: of what enters it, [M, K], taken as a matrix of its own: `channel` is
    a scale for each token; None where it is not quantized.
    """

    format: Float8Format
    granularity: Granularity
    activation: Granularity | None

    def __str__(self) -> str:
        return self.describe(static=False)

    def describe(self, *, static: bool) -> str:
        """Return the scheme in words; static: activations have one calibrated scale."""
        activation = "not quantized" if self.activation is None else _SPOKEN.get(self.activation.name, "1x128")
        return f"{self.format.name} {self.granularity}, activations {'static' if static else activation}"


_SPOKEN = {"tensor": "per tensor", "channel": "per token", "mx": "MX 1x32"}


def scheme_of(format: Float8Format, granularity: Granularity, *, weight_only: bool = False) -> GemmScheme:
    """Return the scheme of a weight: the activation's scales are those that kernels take beside the weight's.

    Where no kernel takes one for each 1x128, because the weight's regions are not whole multiples of that, it is one
    for each token.
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
