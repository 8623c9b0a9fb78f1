"""`diff`: two checkpoints, of any conventions, tensor by tensor."""

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fp8pack.checkpoint.quantized import read_contents
from fp8pack.checkpoint.source import Source, open_checkpoint
from fp8pack.checkpoint.values import ValueReader
from fp8pack.numerics.metrics import energies, sqnr_db
from fp8pack.packing.inspect import strips
from fp8pack.packing.workers import Stop, available_cores, run_threads
from fp8pack.planning.contents import Contents
from fp8pack.planning.experts import split_experts
from fp8pack.planning.spec import FLOAT_DTYPES, TensorSpec


@dataclass(frozen=True, slots=True)
class _Side:
    source: Source
    contents: Contents
    specs: dict[str, TensorSpec]


def diff(a: str | Path, b: str | Path) -> dict[str, Any]:
    """Compare two checkpoints; return what `fp8pack diff --json` prints.

    Of every tensor that both hold: its formats, the share of its bytes that are equal where both store it alike, the
    smallest and largest ratio of its scales (B / A), and the SQNR of B's values against A's, in dB; None where nothing
    differs. Experts that one of them holds fused are compared one by one.

    Raises:
        InputError: a checkpoint is malformed.
    """
    sides = _open(Path(a)), _open(Path(b))
    names = [name for name in sides[0].specs if name in sides[1].specs]
    found: dict[str, dict[str, Any]] = {}

    def work(name: str) -> None:
        found[name] = _compare(name, *sides)

    run_threads([names], lambda: nullcontext(work), count=available_cores(), stop=Stop(), tick=lambda: None)
    tensors = [found[name] for name in names]
    different = [tensor for tensor in tensors if not tensor["equal"]]
    sqnr = {tensor["name"]: tensor["sqnr"] for tensor in different if tensor["sqnr"] is not None}
    worst = min(sqnr, key=lambda name: sqnr[name], default=None)
    return {
        "schema": 1,
        "a": str(sides[0].source.path),
        "b": str(sides[1].source.path),
        "quant_methods": [side.contents.method for side in sides],
        "only_in_a": [name for name in sides[0].specs if name not in sides[1].specs],
        "only_in_b": [name for name in sides[1].specs if name not in sides[0].specs],
        "tensors": tensors,
        "totals": {
            "num_tensors": len(tensors),
            "num_equal": len(tensors) - len(different),
            "sqnr_min": sqnr[worst] if worst else None,
            "sqnr_mean": float(np.mean(list(sqnr.values()))) if sqnr else None,
            "sqnr_worst_tensor": worst,
        },
    }


def _open(path: Path) -> _Side:
    source = open_checkpoint(path)
    contents = split_experts(read_contents(source))
    specs = sorted(contents.tensors, key=lambda spec: spec.name)
    return _Side(source, contents, {spec.name: spec for spec in specs})


def _compare(name: str, a: _Side, b: _Side) -> dict[str, Any]:
    ours, theirs = a.specs[name], b.specs[name]
    tensor: dict[str, Any] = {
        "name": name,
        "shape": list(ours.shape),
        "formats": [_format(side, name) for side in (a, b)],
    }
    if ours.shape != theirs.shape:
        return tensor | {"other_shape": list(theirs.shape), "equal": False, "sqnr": None}
    with ValueReader(a.source, a.contents) as reader, ValueReader(b.source, b.contents) as other:
        tensor |= _scale_ratio(ours, theirs, (reader, other), (a.contents, b.contents))
        equal_bytes, signal, noise = 0, 0.0, 0.0
        alike, numeric = ours.dtype == theirs.dtype, _has_values(ours, a) and _has_values(theirs, b)
        for lo, hi in strips(ours):
            if alike:
                equal_bytes += int(np.count_nonzero(reader.bits(ours, lo, hi) == other.bits(theirs, lo, hi)))
            if numeric:
                energy = energies(reader.values(ours, lo, hi), other.values(theirs, lo, hi))
                signal, noise = signal + energy[0], noise + energy[1]
    count = ours.matrix[0] * ours.matrix[1]
    same = noise == 0 if numeric else alike and equal_bytes == count
    return tensor | {
        "equal": same,
        "equal_bytes": equal_bytes / count if alike and count else None,
        "sqnr": sqnr_db(signal, noise) if numeric and not same else None,
    }


def _format(side: _Side, name: str) -> str:
    quantized = side.contents.quantized.get(name)
    return f"{quantized.format.name} {quantized.granularity}" if quantized else side.specs[name].dtype


def _has_values(spec: TensorSpec, side: _Side) -> bool:
    return spec.dtype in FLOAT_DTYPES or spec.name in side.contents.quantized


def _scale_ratio(
    ours: TensorSpec, theirs: TensorSpec, readers: tuple[ValueReader, ValueReader], both: tuple[Contents, Contents]
) -> dict[str, Any]:
    """The extremes of B's scales over A's, over the regions that the borders of both cut out."""
    known = [contents.quantized.get(ours.name) for contents in both]
    if known[0] is None or known[1] is None:
        return {"scale_ratio": None}
    regions = [quantized.granularity.region(ours.matrix) for quantized in known if quantized]
    borders = [
        np.unique([i for region in regions for i in range(0, ours.matrix[axis], region[axis])]) for axis in (0, 1)
    ]
    spread = [
        reader.scales(spec)[np.ix_(borders[0] // region[0], borders[1] // region[1])]
        for reader, spec, region in zip(readers, (ours, theirs), regions, strict=True)
    ]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = spread[1] / spread[0]
    return {"scale_ratio": [float(np.nanmin(ratio)), float(np.nanmax(ratio))]}
