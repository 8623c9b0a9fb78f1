"""Which weights are rounded with compensation, and with the second moments of which inputs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from fp8pack.errors import RecipeError
from fp8pack.numerics.second_moments import triangles_shape
from fp8pack.planning.calibration import Calibration, Site, expert_of
from fp8pack.planning.plan import Compensation, TensorPlan

TOKENS_PER_CHANNEL = 4  # that an expert must have seen to be rounded by its own second moments


@dataclass(frozen=True, slots=True)
class Compensated:
    """Tensors with their compensation, and notes on those without their own."""

    tensors: list[TensorPlan]
    notes: list[str]


def compensate_tensors(tensors: Sequence[TensorPlan], calibration: Calibration) -> Compensated:
    """Return the tensors with the second moments that each packed weight is rounded with; others are to nearest.

    A weight of an expert that saw too few tokens takes those of all experts of its layer, if they saw enough.

    Raises:
        RecipeError: the calibration has no second moments.
    """
    if not any(site.moments for site in calibration.sites):
        raise RecipeError(
            "compensated rounding needs second moments, which the calibration does not have",
            "run `fp8pack calibrate` with --second-moments blocks",
        )
    peers: dict[tuple[str, str], list[Site]] = {}
    for site in calibration.sites:
        for point in site.points:
            if key := expert_of(point):
                peers.setdefault(key, []).append(site)
    done, nearest, pooled, few = [], [], [], []
    for tensor in tensors:
        if tensor.packing is None or tensor.packing.carried:
            done.append(tensor)
            continue
        point = f"{tensor.spec.name.removesuffix('.weight')}.input"
        own, expert = calibration.by_point.get(point), expert_of(point)
        sites = [own] if own is not None and own.moments else []
        if expert is not None and not _saw_enough(sites):
            sites = [site for site in peers.get(expert, ()) if site.moments and site.tokens]
            sites = sites if _saw_enough(sites) else []
            pooled += [tensor.spec.name] if sites else []
        elif not _saw_enough(sites):
            few += [tensor.spec.name] if sites else []
        if not sites:
            nearest.append(tensor.spec.name)
            done.append(tensor)
            continue
        done.append(_with(tensor, sites))
    return Compensated(done, [*_notes(nearest, pooled, few)])


def _with(tensor: TensorPlan, sites: Sequence[Site]) -> TensorPlan:
    """A tensor with its compensation; its bands become whole rows, which the feedback needs."""
    block = sites[0].moments.block if sites[0].moments else 0
    count, _ = triangles_shape(sites[0].channel_amax.size, block)
    compensation = Compensation(tuple(site.points[0] for site in sites), block, 16 * count * block * block)
    packing = replace(tensor.packing, compensation=compensation) if tensor.packing else None
    return replace(tensor, packing=packing, band_cols=tensor.spec.matrix[1])


def _saw_enough(sites: Sequence[Site]) -> bool:
    """Whether sites together saw four tokens for each channel of a block."""
    blocks = [min(site.moments.block, site.channel_amax.size) for site in sites if site.moments]
    return bool(blocks) and sum(site.tokens for site in sites) >= TOKENS_PER_CHANNEL * max(blocks)


def _notes(nearest: Sequence[str], pooled: Sequence[str], few: Sequence[str]) -> Iterable[str]:
    if nearest:
        yield f"{len(nearest)} weights are rounded to nearest: there are too few tokens of them, such as {nearest[0]}"
    if pooled:
        yield (
            f"{len(pooled)} expert weights got too few tokens; they are compensated for the inputs of all experts of "
            f"the layer, such as {pooled[0]}"
        )
    if few:
        yield (
            f"{len(few)} weights saw fewer than {TOKENS_PER_CHANNEL} tokens for each channel that is compensated, such "
            f"as {few[0]}: calibrate with more prompts"
        )
