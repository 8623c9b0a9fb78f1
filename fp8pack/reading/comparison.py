"""The result of `diff`."""

from dataclasses import dataclass
from pathlib import Path

from fp8pack.documents import Document
from fp8pack.errors import VerificationError


@dataclass(frozen=True, slots=True)
class TensorComparison:
    """A tensor of both checkpoints.

    formats: of A and B. other_shape: B's, if it differs. equal: whether the values are equal. equal_bytes: the share of
    elements whose bytes are equal, None if the two have different dtypes. scale_ratio: the smallest and largest ratio
    of scales, B / A. sqnr: of B's values against A's, in dB; None where nothing differs, and where a NaN or infinity of
    one is not in the other: num_nonfinite counts those.
    """

    name: str
    shape: tuple[int, ...]
    formats: tuple[str, str]
    equal: bool
    other_shape: tuple[int, ...] | None = None
    equal_bytes: float | None = None
    scale_ratio: tuple[float, float] | None = None
    sqnr: float | None = None
    num_nonfinite: int = 0


@dataclass(frozen=True, slots=True)
class ComparisonTotals:
    """Sums over the tensors of both; SQNR in dB over those that differ, None where one alone has a NaN or infinity."""

    num_tensors: int
    num_equal: int
    sqnr_min: float | None
    sqnr_mean: float | None
    sqnr_worst_tensor: str | None


@dataclass(frozen=True, slots=True, repr=False)
class Comparison(Document):
    """Two checkpoints, tensor by tensor; `quant_methods`: those that A and B declare, or empty."""

    a: Path
    b: Path
    quant_methods: tuple[str, str]
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    tensors: tuple[TensorComparison, ...]
    totals: ComparisonTotals

    def check(self) -> None:
        """Raise VerificationError if a NaN or infinity of one is not in the other."""
        spoiled = [tensor for tensor in self.tensors if tensor.num_nonfinite]
        if spoiled:
            more = f", and {len(spoiled) - 1} more tensors" if len(spoiled) > 1 else ""
            count = spoiled[0].num_nonfinite
            what = "1 element is" if count == 1 else f"{count} elements are"
            raise VerificationError(f"{spoiled[0].name!r}: {what} NaN or infinite in A or B alone{more}")
