"""The result of `inspect`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fp8pack.documents import Document, html_table
from fp8pack.engines.judge import EngineVerdict
from fp8pack.errors import NoSuchName, VerificationError
from fp8pack.numerics.metrics import WeightError
from fp8pack.units import format_size


@dataclass(frozen=True, slots=True)
class ScaleRange:
    """The scale tensor of a weight, its smallest and largest multiplier; `tensor` is None without one.

    num_bad: scales that are negative or not finite, which the range leaves out; None where no scale is left.
    """

    tensor: str | None
    min: float | None
    max: float | None
    num_bad: int = 0

    @property
    def spread(self) -> float | None:
        """The largest over the smallest."""
        return self.max / self.min if self.min and self.max is not None else None


@dataclass(frozen=True, slots=True)
class TensorInspection:
    """A tensor of a checkpoint.

    action: `packed`, `copied`, `cast` or `unpacked` in the manifest, `stored` without one. dtype, shape, nbytes:
    as stored. format, granularity, scale: of a quantized weight. source_dtype: before quantization. amax: of its
    source, as recorded. activation_scales: by kind, `input`, `k` or `v`. sqnr: in dB against the source over all
    elements, if it was measured; error: its other metrics; output_sqnr: of the linear's output, predicted from a
    calibration. Where a NaN or infinity is among the values, metrics are
    None.
    """

    name: str
    action: str
    role: str
    reason: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    format: str | None = None
    granularity: str | None = None
    source_dtype: str | None = None
    amax: float | None = None
    scale: ScaleRange | None = None
    activation_scales: Mapping[str, float] | None = None
    sqnr: float | None = None
    error: WeightError | None = None
    output_sqnr: float | None = None

    @property
    def problem(self) -> str:
        """What is no number where numbers should be; empty if nothing."""
        if self.scale and self.scale.num_bad:
            return f"{_counted(self.scale.num_bad, 'scale')} negative, NaN or infinite"
        if self.error and self.error.num_nonfinite:
            return f"{_counted(self.error.num_nonfinite, 'element')} NaN or infinite"
        return ""


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over the tensors.

    source_nbytes: before quantization. num_spoiled: weights with a NaN or infinity where numbers should be. sqnr_min,
    sqnr_mean, cosine_min, output_sqnr_min: None unless they were measured, and where a weight is spoiled.
    """

    num_tensors: int
    num_packed: int
    nbytes: int
    packed_nbytes: int
    source_nbytes: int
    num_spoiled: int = 0
    sqnr_min: float | None = None
    sqnr_mean: float | None = None
    sqnr_worst_tensor: str | None = None
    cosine_min: float | None = None
    output_sqnr_min: float | None = None


@dataclass(frozen=True, slots=True, repr=False)
class Inspection(Document):
    """The tensors of a checkpoint, and the engines that load it.

    against: the source that weights were compared with, None if they were not. quant_method: as config.json declares
    it, empty if none. recipe, root: of the manifest, None if another tool wrote the checkpoint. engines: the verdict of
    each, or of those asked for; empty without FP8 weights.
    """

    checkpoint: Path
    against: Path | None
    architecture: str
    quant_method: str
    recipe: Mapping[str, object] | None
    root: str | None
    tensors: tuple[TensorInspection, ...]
    totals: Totals
    engines: tuple[EngineVerdict, ...]
    warnings: tuple[str, ...]

    def __getitem__(self, name: str) -> TensorInspection:
        """Return a tensor by its name."""
        for tensor in self.tensors:
            if tensor.name == name:
                return tensor
        raise NoSuchName(name, [tensor.name for tensor in self.tensors])

    def check(self) -> None:
        """Raise VerificationError if a NaN or infinity stands where numbers should be."""
        spoiled = [tensor for tensor in self.tensors if tensor.problem]
        if spoiled:
            more = f", and {len(spoiled) - 1} more tensors" if len(spoiled) > 1 else ""
            raise VerificationError(
                f"{self.checkpoint}: {spoiled[0].name!r} has {spoiled[0].problem}{more}",
                "copy the files again from where they were packed",
            )

    def _repr_html_(self) -> str:
        totals = self.totals
        title = f"{self.checkpoint}: {totals.num_packed} of {totals.num_tensors} tensors are FP8"
        title += f", {format_size(totals.nbytes)}" + (f", {self.quant_method}" if self.quant_method else "")
        rows = [
            (
                tensor.name,
                tensor.role,
                f"{tensor.format} {tensor.granularity}" if tensor.format else tensor.dtype,
                " x ".join(map(str, tensor.shape)) or "scalar",
                f"{tensor.scale.min:.3g} to {tensor.scale.max:.3g}" if tensor.scale and tensor.scale.min else "",
                f"{tensor.sqnr:.1f}" if tensor.sqnr is not None else "",
            )
            for tensor in self.tensors
        ]
        return html_table(title, ("tensor", "role", "format", "shape", "scales", "SQNR dB"), rows)


def _counted(count: int, what: str) -> str:
    return f"{count} {what} that is" if count == 1 else f"{count} {what}s that are"
