"""The tensors of an inspection by role: what an overview shows."""

from collections.abc import Iterable
from dataclasses import dataclass

from fp8pack.reading.inspection import Inspection, TensorInspection
from fp8pack.reading.select import select

WORST = 10


@dataclass(frozen=True, slots=True)
class Group:
    """Tensors of one role that are stored alike.

    stored: the format and granularity, or the dtype. reason: why they were kept, empty of quantized ones. sqnr_mean,
    sqnr_min: None unless all were measured. scale_min, scale_max: None without scales.
    """

    role: str
    stored: str
    reason: str
    count: int
    nbytes: int
    sqnr_mean: float | None
    sqnr_min: float | None
    scale_min: float | None
    scale_max: float | None


def groups_of(found: Inspection) -> tuple[tuple[Group, ...], tuple[Group, ...]]:
    """Return the groups of quantized tensors and of all others, the largest first."""
    packed: dict[tuple[str, str, str], list[TensorInspection]] = {}
    kept: dict[tuple[str, str, str], list[TensorInspection]] = {}
    for tensor in found.tensors:
        if tensor.format:
            packed.setdefault((tensor.role, f"{tensor.format} {tensor.granularity}", ""), []).append(tensor)
        else:
            kept.setdefault((tensor.role, tensor.dtype, tensor.reason.removeprefix("policy: ")), []).append(tensor)
    return _groups(packed), _groups(kept)


def worst_of(found: Inspection) -> tuple[TensorInspection, ...]:
    """Return the measured weights of the lowest SQNR, spoiled ones first."""
    measured = (tensor for tensor in select(found, sort="sqnr") if tensor.sqnr is not None or tensor.problem)
    return tuple(tensor for tensor, _ in zip(measured, range(WORST), strict=False))


def _groups(tensors: dict[tuple[str, str, str], list[TensorInspection]]) -> tuple[Group, ...]:
    found = [_group(*key, members) for key, members in tensors.items()]
    return tuple(sorted(found, key=lambda group: -group.nbytes))


def _group(role: str, stored: str, reason: str, members: list[TensorInspection]) -> Group:
    sqnr = _all(tensor.sqnr for tensor in members)
    scales = [tensor.scale for tensor in members if tensor.scale and not tensor.scale.num_bad]
    return Group(
        *(role, stored, reason, len(members), sum(tensor.nbytes for tensor in members)),
        sqnr_mean=sum(sqnr) / len(sqnr) if sqnr else None,
        sqnr_min=min(sqnr, default=None),
        scale_min=min((scale.min for scale in scales if scale.min is not None), default=None),
        scale_max=max((scale.max for scale in scales if scale.max is not None), default=None),
    )


def _all(values: Iterable[float | None]) -> list[float]:
    """The values, none if one of them is missing."""
    listed = list(values)
    known = [value for value in listed if value is not None]
    return known if len(known) == len(listed) else []
