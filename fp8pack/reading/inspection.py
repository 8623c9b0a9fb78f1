"""The result of `inspect`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fp8pack.documents import Document, html_table
from fp8pack.engines.judge import EngineVerdict
from fp8pack.units import format_size


@dataclass(frozen=True, slots=True)
class ScaleRange:
    """The scale tensor of a weight, its smallest and largest multiplier; `tensor` is None without one."""

    tensor: str | None
    min: float
    max: float


@dataclass(frozen=True, slots=True)
class TensorInspection:
    """A tensor of a checkpoint.

    action: `packed`, `copied`, `cast` or `unpacked` in the manifest, `stored` without one. dtype, shape, nbytes:
    as stored. format, granularity, scale: of an FP8 weight. amax: of its source, as recorded. activation_scales: by
    kind, `input`, `k` or `v`. sqnr: in dB against the source over all elements, if it was measured.
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
    amax: float | None = None
    scale: ScaleRange | None = None
    activation_scales: Mapping[str, float] | None = None
    sqnr: float | None = None


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over the tensors; SQNR in dB, None unless it was measured."""

    num_tensors: int
    num_packed: int
    nbytes: int
    packed_nbytes: int
    sqnr_min: float | None = None
    sqnr_mean: float | None = None
    sqnr_worst_tensor: str | None = None


@dataclass(frozen=True, slots=True, repr=False)
class Inspection(Document):
    """The tensors of a checkpoint, and the engines that load it.

    quant_method: as config.json declares it, empty if none. recipe, root: of the manifest, None if another tool wrote
    the checkpoint. engines: the verdict of each, or of those asked for; empty without FP8 weights.
    """

    checkpoint: Path
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
        raise KeyError(name)

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
                f"{tensor.scale.min:.3g} to {tensor.scale.max:.3g}" if tensor.scale else "",
                f"{tensor.sqnr:.1f}" if tensor.sqnr is not None else "",
            )
            for tensor in self.tensors
        ]
        return html_table(title, ("tensor", "role", "format", "shape", "scales", "SQNR dB"), rows)
