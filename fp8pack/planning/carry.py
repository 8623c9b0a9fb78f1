"""What a conversion passes through unchanged: FP8 payloads, and scales of activations."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod

from fp8pack.errors import InputError
from fp8pack.modelfacts.contents import Contents, Quantized
from fp8pack.modelfacts.spec import Stored, TensorSpec
from fp8pack.numerics.granularity import TENSOR
from fp8pack.numerics.rounding import ScaleRounding
from fp8pack.planning.activation_scales import Kind
from fp8pack.planning.plan import Action, Packing, QuantMethod, TensorPlan
from fp8pack.planning.recipe import Recipe


def can_carry(spec: TensorSpec, quantized: Quantized, packing: Packing, *, powers_of_two: bool) -> bool:
    """Say whether the payload of a weight can be passed through: each scale region is within one of the source.

    powers_of_two: whether the source declares this of all its scales; a packing may need it.
    """
    if quantized.format != packing.format:
        return False
    theirs, ours = quantized.granularity.region(spec.shape), packing.granularity.region(spec.shape)
    within = all(theirs[i] % ours[i] == 0 or theirs[i] >= spec.shape[i] for i in (0, 1))
    has_powers = powers_of_two or quantized.has_exponents or quantized.scale is None
    return within and (has_powers or packing.rounding == ScaleRounding.NONE)


def agree(tensors: Sequence[TensorPlan]) -> list[TensorPlan]:
    """Pass the parts of a fused module through together or not at all, if they share a tensor-wide scale."""
    anew = {
        tensor.packing.scale_group
        for tensor in tensors
        if tensor.packing and tensor.packing.granularity == TENSOR and not tensor.packing.carried
    }
    return [
        replace(tensor, packing=replace(tensor.packing, carried=False))
        if tensor.packing and tensor.packing.granularity == TENSOR and tensor.packing.scale_group in anew
        else tensor
        for tensor in tensors
    ]


def activation_scales(
    tensors: Sequence[TensorPlan], contents: Contents, recipe: Recipe, method: QuantMethod
) -> Iterator[TensorPlan]:
    """Yield the activation scales of the source, under the names of a quant method, unless they are calibrated.

    Raises:
        InputError: a weight needs a static input scale and has none, or the scale of K or V has one value per head,
            which the quant method does not support.
    """
    if recipe.activations == "static":
        for tensor in tensors:
            if tensor.packing and not any(scale.kind == "input" for scale in tensor.activations):
                yield _input_scale(tensor, method)
    calibrated = {(scale.kind, scale.point) for tensor in tensors for scale in tensor.activations}
    names = {tensor.spec.name for tensor in tensors}
    for point, spec in contents.kv_scales.items() if recipe.kv_cache else ():
        attention, _, last = point.rpartition(".")
        kind: Kind = "k" if last == "k" else "v"
        if (kind, point) in calibrated:
            continue
        if prod(spec.shape) > 1 and not method.holds_head_scales:
            raise InputError(
                f"{spec.name} has one scale per head, which {method.name} does not support",
                "calibrate again: --calibration FILE --kv-cache",
            )
        owner = f"{attention}.{kind}_proj.weight"
        owner = owner if owner in names else f"{attention}.weight"
        yield _copy(spec, method.kv_scale(attention, kind, owner), owner, f"scale of {kind.upper()} in the source")


def _input_scale(tensor: TensorPlan, method: QuantMethod) -> TensorPlan:
    name = tensor.spec.name
    if tensor.quantized is None or tensor.quantized.input_scale is None:
        raise InputError(f"{name} has no input scale", "--activations dynamic, or --calibration FILE")
    return _copy(tensor.quantized.input_scale, method.input_scale(name), name, f"scale of what enters {name}")


def _copy(spec: TensorSpec, stored: Stored, beside: str, reason: str) -> TensorPlan:
    """A scale that is copied under another name, and in another shape of as many elements."""
    shape = stored.shape if prod(stored.shape) == prod(spec.shape) else spec.shape
    copy, renamed = Stored(stored.name, spec.dtype, shape), replace(spec, name=stored.name)
    return TensorPlan(renamed, Action.COPIED, "activation_scale", reason, copy, max(1, spec.nbytes), beside=beside)
