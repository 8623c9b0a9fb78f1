"""One tensor of a checkpoint: its numbers as histograms, why it is stored as it is, what others would cost."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fp8pack.checkpoint.quantized import read_contents
from fp8pack.checkpoint.source import Source, open_checkpoint
from fp8pack.checkpoint.values import ValueReader, strips
from fp8pack.documents import Document
from fp8pack.errors import InputError, RecipeError, VerificationError
from fp8pack.inputs import parse_path, parse_switch
from fp8pack.modelfacts.contents import Contents
from fp8pack.modelfacts.spec import FLOAT_DTYPES, TensorSpec
from fp8pack.numerics.metrics import ErrorTally, WeightError
from fp8pack.reading.alternatives import CASES, quantized_strips
from fp8pack.reading.inspect import entry_of, with_errors
from fp8pack.reading.inspection import TensorInspection
from fp8pack.reading.measure import Origin, measure

_VALUE_BINS, _SCALE_BINS = 24, 16


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts of values between edges: counts[i] lie from edges[i] to edges[i + 1]."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Alternative:
    """What another format and granularity would cost: bytes with scales, and the SQNR in dB against the source."""

    format: str
    granularity: str
    nbytes: int
    sqnr: float | None
    error: WeightError


@dataclass(frozen=True, slots=True, repr=False)
class TensorDetail(Document):
    """One tensor of a checkpoint.

    values: dequantized. exponents: how many values other than zero lie in each binade [2^e, 2^(e+1)). scales: of a
    quantized weight, in bins of equal ratio. alternatives: every format and granularity of the source, if asked for.
    """

    checkpoint: Path
    against: Path | None
    tensor: TensorInspection
    values: Histogram
    exponents: Histogram
    scales: Histogram | None
    alternatives: tuple[Alternative, ...]

    def check(self) -> None:
        """Raise VerificationError if a NaN or infinity stands where numbers should be."""
        if self.tensor.problem:
            raise VerificationError(f"{self.checkpoint}: {self.tensor.name!r} has {self.tensor.problem}")


def inspect_tensor(
    checkpoint: str | Path, tensor: str, against: str | Path | None = None, *, explain: bool = False
) -> TensorDetail:
    """Return the numbers of one tensor as histograms, and what other formats and granularities would cost.

    tensor: its name, or that of its module. against: the source; measures the error of a quantized weight. explain:
        quantizes the source of the weight, or the weight itself if it is a float, in every format and granularity.

    Raises:
        InputError: the checkpoint is malformed, or has no such tensor, or it has no numeric values.
        VerificationError: a scale is negative or not finite.
        RecipeError: explain needs the source.
    """
    parse_switch("explain", explain)
    opened = open_checkpoint(parse_path("checkpoint", checkpoint))
    contents = read_contents(opened)
    spec = next((spec for spec in contents.tensors if spec.name in (tensor, f"{tensor}.weight")), None)
    if spec is None:
        raise contents.no_such_tensor(opened.path, tensor)
    quantized = contents.quantized.get(spec.name)
    if quantized is None and spec.dtype not in FLOAT_DTYPES:
        raise InputError(f"{opened.path}: {spec.name!r} is {spec.dtype}, which has no numeric values")
    if explain and quantized is not None and against is None:
        raise RecipeError("the source of the weight is what is quantized, and none is given", "--against SOURCE")
    origin = Origin(opened, parse_path("against", against)) if against is not None and quantized is not None else None
    with ValueReader(opened, contents) as reader:
        found = entry_of(spec, contents, opened.manifest, reader)
        if found.problem:
            raise VerificationError(f"{opened.path}: {spec.name!r} has {found.problem}")
        values, exponents = _histograms(reader, spec)
        scales = reader.scales(spec) if quantized is not None else None
    alternatives: tuple[Alternative, ...] = ()
    if origin is not None:
        alone = replace(contents, tensors=(spec,))
        tallies = measure(opened, alone, origin, without=(), on_progress=lambda done, total: None)
        found = with_errors(found, tallies[spec.name])
    if explain and origin is not None:
        alternatives = tuple(_alternatives(origin.source, origin.contents, origin.of(spec)))
    elif explain:
        alternatives = tuple(_alternatives(opened, contents, spec))
    return TensorDetail(
        checkpoint=opened.path,
        against=origin.source.path if origin else None,
        tensor=found,
        values=values,
        exponents=exponents,
        scales=None if scales is None else _by_ratio(scales.ravel()),
        alternatives=alternatives,
    )


def _histograms(reader: ValueReader, spec: TensorSpec) -> tuple[Histogram, Histogram]:
    """Of values, and of their exponents; what is not finite is in neither."""
    amax = 0.0
    for lo, hi in strips(spec):
        values = np.abs(reader.values(spec, lo, hi))
        amax = max(amax, float(np.max(values, initial=0.0, where=np.isfinite(values))))
    edges = np.linspace(-amax, amax, _VALUE_BINS + 1) if amax else np.linspace(-1, 1, _VALUE_BINS + 1)
    counts, exponents = np.zeros(_VALUE_BINS, np.int64), np.zeros(256, np.int64)
    for lo, hi in strips(spec):
        values = reader.values(spec, lo, hi).ravel()
        values = values[np.isfinite(values)]
        counts += np.histogram(values, edges)[0]
        exponents += np.bincount(values[values != 0].view(np.uint32) >> 23 & 0xFF, minlength=256)
    used = np.flatnonzero(exponents)
    first, last = (int(used[0]), int(used[-1])) if used.size else (127, 127)
    binades = tuple(2.0 ** (exponent - 127) for exponent in range(first, last + 2))
    return (
        Histogram(tuple(map(float, edges)), tuple(map(int, counts))),
        Histogram(binades, tuple(map(int, exponents[first : last + 1]))),
    )


def _by_ratio(scales: NDArray[np.float32]) -> Histogram | None:
    """Scales above zero in bins of equal ratio; None if there is none."""
    good = scales[np.isfinite(scales) & (scales > 0)].astype(np.float64)
    if not good.size:
        return None
    low, high = float(good.min()), float(good.max())
    if low == high:
        return Histogram((low, high), (good.size,))
    edges = np.geomspace(low, high, _SCALE_BINS + 1)
    edges[0], edges[-1] = low, high
    return Histogram(tuple(map(float, edges)), tuple(map(int, np.histogram(good, edges)[0])))


def _alternatives(source: Source, contents: Contents, spec: TensorSpec) -> Iterator[Alternative]:
    """The weight of a source in every format and granularity."""
    tallies = {case: ErrorTally(case.format, spec.dtype) for case in CASES}
    with ValueReader(source, contents) as reader:
        for bits, found in quantized_strips(reader, spec):
            for case, (values, codes) in found.items():
                tallies[case].add(bits, values, codes)
    for case, tally in tallies.items():
        nbytes = case.nbytes((spec.matrix[0], spec.matrix[1]))
        yield Alternative(case.format.name, case.granularity.name, nbytes, tally.sqnr, tally.error)
