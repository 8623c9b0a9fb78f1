"""The result of `diff`."""

from dataclasses import dataclass
from pathlib import Path

from fp8pack.documents import Document


@dataclass(frozen=True, slots=True)
class TensorComparison:
    """A tensor of both checkpoints.

    formats: of A and B. other_shape: B's, if it differs. equal: whether the values are equal. equal_bytes: the share of
    elements whose bytes are equal, None if the two have different dtypes. scale_ratio: the smallest and largest ratio
    of scales, B / A. sqnr: of B's values against A's, in dB; None where nothing differs.
    """

    name: str
    shape: tuple[int, ...]
    formats: tuple[str, str]
    equal: bool
    other_shape: tuple[int, ...] | None = None
    equal_bytes: float | None = None
    scale_ratio: tuple[float, float] | None = None
    sqnr: float | None = None


@dataclass(frozen=True, slots=True)
class ComparisonTotals:
    """Sums over the tensors of both; SQNR in dB over those that differ."""

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
