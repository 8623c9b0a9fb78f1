"""`diff`: two checkpoints, of any quant methods, tensor by tensor."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fp8pack.bounds import parse_bounds
from fp8pack.checkpoint.quantized import read_contents
from fp8pack.checkpoint.scales import num_bad
from fp8pack.checkpoint.source import Source, open_checkpoint
from fp8pack.checkpoint.values import ValueReader, strips
from fp8pack.inputs import Texts, parse_path
from fp8pack.machine import usable_cores
from fp8pack.modelfacts.contents import Contents
from fp8pack.modelfacts.experts import split_experts
from fp8pack.modelfacts.spec import DTYPE_BITS, FLOAT_DTYPES, TensorSpec
from fp8pack.numerics.metrics import energies, sqnr_db
from fp8pack.packing.workers import Stop, run_threads
from fp8pack.reading.bounds import COMPARISON_METRICS, check_bounds
from fp8pack.reading.comparison import Comparison, ComparisonTotals, TensorComparison


@dataclass(frozen=True, slots=True)
class _Side:
    source: Source
    contents: Contents
    specs: dict[str, TensorSpec]


def diff(a: str | Path, b: str | Path, *, fail_if: Texts = ()) -> Comparison:
    """Compare two checkpoints, tensor by tensor: formats, scales, equal bytes, SQNR of B against A.

    Experts that one of them has fused are compared one by one. fail_if: bounds such as "sqnr_min<28".

    Raises:
        InputError: a checkpoint is malformed. VerificationError: a NaN or infinity of one is not in the other.
        BoundError: a bound is broken. RecipeError: one is malformed.
    """
    bounds = parse_bounds(fail_if, COMPARISON_METRICS)
    found = compare(a, b)
    found.check()
    check_bounds(found, bounds)
    return found


def compare(a: str | Path, b: str | Path) -> Comparison:
    """Return what `diff` does, without checking values and bounds."""
    sides = _open(parse_path("a", a)), _open(parse_path("b", b))
    names = [name for name in sides[0].specs if name in sides[1].specs]
    found: dict[str, TensorComparison] = {}

    def work(name: str) -> None:
        found[name] = _compare(name, *sides)

    run_threads([names], lambda: nullcontext(work), count=usable_cores(), stop=Stop(), tick=lambda: None)
    tensors = tuple(found[name] for name in names)
    different = [tensor for tensor in tensors if not tensor.equal]
    sqnr = {tensor.name: tensor.sqnr for tensor in different if tensor.sqnr is not None}
    if any(tensor.num_nonfinite for tensor in different):
        sqnr = {}  # a mean over the others would hide it
    worst = min(sqnr, key=lambda name: sqnr[name], default=None)
    totals = ComparisonTotals(
        num_tensors=len(tensors),
        num_equal=len(tensors) - len(different),
        sqnr_min=sqnr[worst] if worst else None,
        sqnr_mean=float(np.mean(list(sqnr.values()))) if sqnr else None,
        sqnr_worst_tensor=worst,
    )
    return Comparison(
        a=sides[0].source.path,
        b=sides[1].source.path,
        quant_methods=(sides[0].contents.method, sides[1].contents.method),
        only_in_a=tuple(name for name in sides[0].specs if name not in sides[1].specs),
        only_in_b=tuple(name for name in sides[1].specs if name not in sides[0].specs),
        tensors=tensors,
        totals=totals,
    )


def _open(path: Path) -> _Side:
    source = open_checkpoint(path)
    contents = split_experts(read_contents(source))
    specs = sorted((*contents.tensors, *_scales_of_activations(contents)), key=lambda spec: spec.name)
    return _Side(source, contents, {spec.name: spec for spec in specs})


def _scales_of_activations(contents: Contents) -> Iterator[TensorSpec]:
    """The scales of input activations, K and V, under one name for all quant methods."""
    for spec in contents.tensors:
        quantized = contents.quantized.get(spec.name)
        if quantized is not None and quantized.input_scale is not None:
            yield _as_number(quantized.input_scale, f"{spec.name.removesuffix('.weight')}.input_scale")
    for point, spec in contents.kv_scales.items():
        yield _as_number(spec, f"{point}_scale")


def _as_number(spec: TensorSpec, name: str) -> TensorSpec:
    """A scale under a name, without dimensions if it is one number: quant methods differ in that."""
    return replace(spec, name=name, shape=() if spec.nbytes == DTYPE_BITS[spec.dtype] // 8 else spec.shape)


@dataclass(slots=True)
class _Tally:
    """The comparison of two tensors, strip by strip; `num_nonfinite`: NaNs and infinities that one alone has.

    Elements are of the dtype, or bytes if smaller.
    """

    num_elements: int = 0
    num_equal: int = 0
    num_different: int = 0
    signal: float = 0.0
    noise: float = 0.0
    num_nonfinite: int = 0

    def add(self, ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> None:
        """Count values of the same place."""
        same = (ours == theirs) | (np.isnan(ours) & np.isnan(theirs))
        finite = np.isfinite(ours) & np.isfinite(theirs)
        energy = energies(np.where(finite, ours, 0), np.where(finite, theirs, 0))
        self.signal, self.noise = self.signal + energy[0], self.noise + energy[1]
        self.num_different += int(np.count_nonzero(~same))
        self.num_nonfinite += int(np.count_nonzero(~same & ~finite))

    @property
    def sqnr(self) -> float | None:
        """In dB, None where nothing differs, or where one has a NaN or infinity; LOST_DB where no signal is left."""
        if not self.num_different or self.num_nonfinite:
            return None
        return sqnr_db(self.signal, self.noise)


def _compare(name: str, a: _Side, b: _Side) -> TensorComparison:
    ours, theirs = a.specs[name], b.specs[name]
    formats = (_format(a, name), _format(b, name))
    if ours.shape != theirs.shape:
        return TensorComparison(name, ours.shape, formats, equal=False, other_shape=theirs.shape)
    tally = _Tally()
    alike, numeric = ours.dtype == theirs.dtype, _has_values(ours, a) and _has_values(theirs, b)
    with ValueReader(a.source, a.contents) as reader, ValueReader(b.source, b.contents) as other:
        ratio = _scale_ratio(ours, theirs, (reader, other), (a.contents, b.contents))
        for lo, hi in strips(ours):
            if alike:
                same = reader.bits(ours, lo, hi) == other.bits(theirs, lo, hi)
                tally.num_elements += same.size
                tally.num_equal += int(np.count_nonzero(same))
            if numeric:
                tally.add(reader.values(ours, lo, hi), other.values(theirs, lo, hi))
    return TensorComparison(
        *(name, ours.shape, formats),
        equal=not tally.num_different if numeric else alike and tally.num_equal == tally.num_elements,
        equal_bytes=tally.num_equal / tally.num_elements if tally.num_elements else None,
        scale_ratio=ratio,
        sqnr=tally.sqnr,
        num_nonfinite=tally.num_nonfinite,
    )


def _format(side: _Side, name: str) -> str:
    quantized = side.contents.quantized.get(name)
    return f"{quantized.format.name} {quantized.granularity}" if quantized else side.specs[name].dtype


def _has_values(spec: TensorSpec, side: _Side) -> bool:
    return spec.dtype in FLOAT_DTYPES or spec.name in side.contents.quantized


def _scale_ratio(
    ours: TensorSpec, theirs: TensorSpec, readers: tuple[ValueReader, ValueReader], both: tuple[Contents, Contents]
) -> tuple[float, float] | None:
    """The extremes of B's scales over A's, over the intersections of their scale regions."""
    known = [contents.quantized.get(ours.name) for contents in both]
    regions = [quantized.granularity.region(ours.matrix) for quantized in known if quantized]
    if len(regions) < 2 or not prod(ours.shape):
        return None
    borders = [
        np.unique([i for region in regions for i in range(0, ours.matrix[axis], region[axis])]) for axis in (0, 1)
    ]
    spread = [
        reader.scales(spec)[np.ix_(borders[0] // region[0], borders[1] // region[1])]
        for reader, spec, region in zip(readers, (ours, theirs), regions, strict=True)
    ]
    if sum(map(num_bad, spread)):
        return None
    known_scales = spread[0] > 0
    ratio = spread[1][known_scales] / spread[0][known_scales]
    return (float(ratio.min()), float(ratio.max())) if ratio.size else None
