"""`inspect`: what a checkpoint holds, packed or not, and how much quantization took away."""

import re
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fp8pack.checkpoint.calibration_file import is_calibration, read_calibration
from fp8pack.checkpoint.manifest_schema import (
    ActivationEntry,
    Manifest,
    PackedEntry,
    ScaleEntry,
    find_manifest,
    read_manifest,
)
from fp8pack.checkpoint.source import ShardReader, Source, open_checkpoint
from fp8pack.errors import BoundError, InputError, RecipeError
from fp8pack.numerics.formats import parse_format
from fp8pack.numerics.metrics import error_energy, sqnr_db
from fp8pack.numerics.scaling import decode_e8m0
from fp8pack.packing.codecs import BITS_DTYPE
from fp8pack.packing.workers import Stop, available_cores, run_threads
from fp8pack.planning.calibration_facts import calibration_facts
from fp8pack.planning.policy import judge
from fp8pack.planning.spec import TensorSpec

_STRIP_NBYTES = 4 << 20
METRICS = ("sqnr_min", "sqnr_mean")


@dataclass(frozen=True, slots=True)
class Bound:
    """A `--fail-if` bound: broken when the metric lies below (`<`) or above (`>`) the value."""

    metric: str
    sign: str
    value: float


def parse_bound(text: str) -> Bound:
    """Return the bound of a text such as `sqnr_min<28`."""
    match = re.fullmatch(r"\s*(\w+)\s*([<>])\s*(-?\d+(?:\.\d+)?)\s*", text)
    if match is None or match[1] not in METRICS:
        raise RecipeError(
            f"--fail-if {text!r} is not understood: write METRIC<VALUE with a metric of {', '.join(METRICS)}"
        )
    return Bound(match[1], match[2], float(match[3]))


def inspect(checkpoint: str | Path, against: str | Path | None = None) -> dict[str, Any]:
    """Return what a checkpoint or a calibration file holds.

    against: the source of a packed checkpoint, for the SQNR of every packed weight.

    Raises:
        InputError: the checkpoint or the source is malformed, or the two do not belong together.
    """
    path = Path(checkpoint)
    if path.is_file() and is_calibration(path):
        if against is not None:
            raise InputError(f"{checkpoint} is a calibration: nothing in it can be held against weights")
        return {"schema": 1, "calibration": str(path), **calibration_facts(read_calibration(path), every_site=True)}
    opened = open_checkpoint(path)
    manifest_path = find_manifest(opened.path)
    if manifest_path is None:
        if against is not None:
            raise InputError(
                f"{checkpoint} has no fp8pack.json, so nothing says how its weights were packed from {against}"
            )
        return _facts(opened, None, [_unpacked(spec, opened) for spec in opened.specs])
    manifest = read_manifest(manifest_path)
    _check_headers(opened, manifest)
    source = open_checkpoint(Path(against)) if against is not None else None
    sqnr = _measure(opened, manifest, source) if source else {}
    specs = {spec.name: spec for spec in opened.specs}
    return _facts(
        opened, manifest, [_entry(name, manifest, specs, opened, sqnr.get(name)) for name in manifest.tensors]
    )


def check_bounds(facts: dict[str, Any], bounds: list[Bound]) -> None:
    """Raise BoundError for the first bound that the facts break; RecipeError if a metric was not measured."""
    for bound in bounds:
        value = facts.get("totals", {}).get(bound.metric)
        if value is None:
            raise RecipeError(f"--fail-if {bound.metric}: it is measured with --against SOURCE")
        if value < bound.value if bound.sign == "<" else value > bound.value:
            raise BoundError(f"{bound.metric} is {value:.2f}, which is {bound.sign} {bound.value:g}")


def _facts(opened: Source, manifest: Manifest | None, tensors: list[dict[str, Any]]) -> dict[str, Any]:
    sqnr = [tensor["sqnr"] for tensor in tensors if tensor.get("sqnr") is not None]
    worst = min(
        (tensor for tensor in tensors if tensor.get("sqnr") is not None),
        key=lambda tensor: tensor["sqnr"],
        default=None,
    )
    return {
        "schema": 1,
        "checkpoint": str(opened.path),
        "architecture": opened.facts.architecture,
        "recipe": manifest.recipe if manifest else None,
        "root": manifest.root if manifest else None,
        "tensors": tensors,
        "totals": {
            "num_tensors": len(tensors),
            "num_packed": sum(tensor["action"] == "packed" for tensor in tensors),
            "nbytes": sum(spec.nbytes for spec in opened.specs),
            "packed_nbytes": sum(tensor["nbytes"] for tensor in tensors if tensor["action"] == "packed"),
            "sqnr_min": worst["sqnr"] if worst else None,
            "sqnr_mean": float(np.mean(sqnr)) if sqnr else None,
            "sqnr_worst_tensor": worst["name"] if worst else None,
        },
    }


def _unpacked(spec: TensorSpec, opened: Source) -> dict[str, Any]:
    verdict = judge(spec, opened.facts)
    reason = verdict.reason if not verdict.packed else "not packed; pack would take it"
    tensor = {"name": spec.name, "action": "stored", "role": verdict.role, "reason": reason}
    return tensor | {"dtype": spec.dtype, "shape": list(spec.shape), "nbytes": spec.nbytes}


def _check_headers(opened: Source, manifest: Manifest) -> None:
    """Every tensor of the manifest lies in its file, as it says, and nothing else does."""
    found = {spec.name: (spec.file, spec.dtype, list(spec.shape)) for spec in opened.specs}
    for name, entry in manifest.tensors.items():
        dtype = parse_format(entry.format).dtype if isinstance(entry, PackedEntry) else entry.dtype
        if found.pop(name, None) != (entry.file, dtype, list(entry.shape)):
            raise InputError(f"tensor {name!r} is not what fp8pack.json says: the files were changed after packing")
        scales: list[ScaleEntry | ActivationEntry] = list(entry.activation_scales)
        if isinstance(entry, PackedEntry):
            scales.append(entry.scale_inv)
        for scale in scales:
            if found.pop(scale.tensor, None) != (entry.file, scale.dtype, scale.shape):
                raise InputError(
                    f"scale {scale.tensor!r} is not what fp8pack.json says: the files were changed after packing"
                )
    if found:
        raise InputError(f"tensor {min(found)!r} is not in fp8pack.json: the files were changed after packing")


def _entry(
    name: str, manifest: Manifest, specs: dict[str, TensorSpec], opened: Source, sqnr: float | None
) -> dict[str, Any]:
    entry, spec = manifest.tensors[name], specs[name]
    tensor: dict[str, Any] = {"name": name, "action": entry.action, "role": entry.role, "reason": entry.reason}
    tensor |= {"dtype": spec.dtype, "shape": list(spec.shape), "nbytes": spec.nbytes}
    if entry.activation_scales:
        tensor["activation_scales"] = {scale.kind: scale.value for scale in entry.activation_scales}
    if isinstance(entry, PackedEntry):
        scales = read_scales(specs[entry.scale_inv.tensor], opened.directory)
        tensor |= {"format": entry.format, "granularity": entry.granularity, "amax": entry.amax, "sqnr": sqnr}
        tensor |= {"scale": {"tensor": entry.scale_inv.tensor, "min": float(scales.min()), "max": float(scales.max())}}
    return tensor


def read_scales(spec: TensorSpec, directory: Path) -> NDArray[np.float32]:
    """Return a scale tensor as float32, E8M0 exponents decoded, in its stored shape."""
    data = _read(spec, directory, 0, spec.nbytes)
    return decode_e8m0(data).reshape(spec.shape) if spec.dtype == "U8" else data.view(np.float32).reshape(spec.shape)


def _read(spec: TensorSpec, directory: Path, offset: int, nbytes: int) -> NDArray[np.uint8]:
    reader = ShardReader(directory / spec.file)
    try:
        data = np.empty(nbytes, np.uint8)
        reader.readinto(data.data, spec.begin + offset)
        return data
    finally:
        reader.close()


def _measure(opened: Source, manifest: Manifest, source: Source) -> dict[str, float]:
    """The SQNR of every packed weight over all of its elements."""
    specs, origins = ({spec.name: spec for spec in checkpoint.specs} for checkpoint in (opened, source))
    energies: dict[str, tuple[float, float]] = {}
    lock = Lock()

    def work(job: tuple[str, PackedEntry]) -> None:
        name, entry = job
        origin = origins.get(name)
        if origin is None or origin.shape != entry.shape or origin.dtype not in BITS_DTYPE:
            raise InputError(
                f"{source.path} holds no weight {name!r} of shape {list(entry.shape)}: it is not the source"
            )
        energy = _energy(entry, specs, origin, (opened.directory, source.directory))
        with lock:
            energies[name] = energy

    packed = [(name, entry) for name, entry in manifest.tensors.items() if isinstance(entry, PackedEntry)]
    run_threads([packed], lambda: nullcontext(work), count=available_cores(), stop=Stop(), tick=lambda: None)
    return {name: sqnr_db(*energy) for name, energy in energies.items()}


def _energy(
    entry: PackedEntry, specs: dict[str, TensorSpec], origin: TensorSpec, directories: tuple[Path, Path]
) -> tuple[float, float]:
    (n, k), (rows, cols) = entry.shape, entry.block
    scales = read_scales(specs[entry.scale_inv.tensor], directories[0]).reshape(-(-n // rows), -(-k // cols))
    spec = specs[origin.name]
    itemsize = BITS_DTYPE[origin.dtype].itemsize
    whole = rows >= n
    step = max(1, _STRIP_NBYTES // (k * itemsize * (1 if whole else rows))) * (1 if whole else rows)
    signal = noise = 0.0
    for lo in range(0, n, step):
        hi = min(lo + step, n)
        weight = _read(origin, directories[1], lo * k * itemsize, (hi - lo) * k * itemsize).view(
            BITS_DTYPE[origin.dtype]
        )
        payload = _read(spec, directories[0], lo * k, (hi - lo) * k)
        part = scales if whole else scales[lo // rows : -(-hi // rows)]
        region = (hi - lo if whole else rows, cols)
        energy = error_energy(
            *(weight.reshape(-1, k), payload.reshape(-1, k), part),
            dtype=origin.dtype,
            region=region,
            format=parse_format(entry.format),
        )
        signal, noise = signal + energy[0], noise + energy[1]
    return signal, noise
