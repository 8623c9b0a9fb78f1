"""Give the linears of a Transformer Engine model the scales of an fp8pack calibration, and freeze them.

    calibration = read_calibration(Path("calibration.safetensors"))
    recipe = frozen_recipe()
    with torch.no_grad(), autocast(recipe):
        model(inputs)                                   # Transformer Engine makes its state in the first pass
    prewarm(model, calibration)
    with torch.no_grad(), autocast(recipe):
        model(inputs)                                   # static scales from here on

`seeds` and `write` are plain torch; only `autocast`, `frozen_recipe` and `linears_of` import Transformer Engine.

What is known of DelayedScaling (NVIDIA/TransformerEngine, transformer_engine/pytorch/quantization.py at 001597e, seen
2026-11-20): `fp8_meta["scaling_fwd"]` has `scale` [tensors] and `amax_history` [length, tensors], float32; the tensors
of a GEMM are input, weight, output. `scale` is the factor that quantizes, 1 / ours. A pass records its amax in row 0
of the history; the update then takes the scale from the history, turns it by one row, so that the newest lies in the
last row and the oldest in row 1, and sets row 0 to zero. Quantizers hold views of both tensors, so they are written in
place. Under `torch.no_grad()` there is no update at all.
"""

import math
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fp8pack.modelfacts.fused import fused_module
from fp8pack.numerics.formats import E4M3
from fp8pack.planning.calibration import Calibration, values_of

INPUT, WEIGHT = 0, 1  # of the tensors of a GEMM; the third is its output, which stays BF16


class Meta(Protocol):
    """`fp8_meta["scaling_fwd"]` of a module."""

    scale: Tensor
    amax_history: Tensor


@dataclass(frozen=True, slots=True)
class Seed:
    """What a linear starts with: amax_history [length, 2] and scale [2], float32, of its input and its weight.

    parts: the checkpoint's modules behind it; more than one where it is fused.
    """

    parts: tuple[str, ...]
    amax_history: Tensor
    scale: Tensor


@dataclass(frozen=True, slots=True)
class Seeds:
    """A seed for each linear that was calibrated; the names of those that were not, and of sites without a linear."""

    by_module: Mapping[str, Seed]
    missing: tuple[str, ...]
    unused: tuple[str, ...]


def seeds(
    calibration: Calibration,
    weight_amax: Mapping[str, float],
    *,
    history_length: int,
    margin: int = 0,
    names: Mapping[str, Iterable[str]] | None = None,
) -> Seeds:
    """Return what each linear of a model starts with.

    weight_amax: of each linear, by its path in the model. names: the checkpoint's modules behind a path, where it is
        neither one of them nor fused as engines do it (`….qkv_proj` of q, k and v, `….gate_up_proj` of gate and up).
    Numerics: scale = 448 / amax / 2^margin in float32, of all prompts; 1 where amax is zero, infinite or NaN; the
        largest float32 where it would be infinite. A fused linear has the largest amax of its parts.
    Raises:
        ValueError: the history has no row.
    """
    if history_length < 1:
        raise ValueError("a history has at least one row")
    inputs = [point.removesuffix(".input") for point in calibration.by_point if point.endswith(".input")]
    behind = _modules_behind(inputs) | {path: tuple(parts) for path, parts in (names or {}).items()}
    found: dict[str, Seed] = {}
    for path, weight in weight_amax.items():
        parts = tuple(part for part in behind.get(path, ()) if f"{part}.input" in calibration.by_point)
        if parts and len(parts) == len(behind[path]):
            prompts = _prompt_amax(calibration, parts)
            amax = torch.stack([prompts.max(), torch.tensor(weight)])
            found[path] = Seed(parts, _history(prompts, weight, history_length), scale_of(amax, margin))
    missing = tuple(path for path in weight_amax if path not in found)
    used = {part for seed in found.values() for part in seed.parts}
    return Seeds(found, missing, tuple(name for name in inputs if name not in used))


def scale_of(amax: Tensor, margin: int = 0) -> Tensor:
    """Return Transformer Engine's scale of each amax: both float32, of one shape."""
    scale = torch.tensor(E4M3.max) / amax / 2**margin
    scale = scale.clamp(max=torch.finfo(torch.float32).max)
    return torch.where((amax > 0) & torch.isfinite(amax), scale, torch.ones_like(scale))


def _modules_behind(modules: list[str]) -> dict[str, tuple[str, ...]]:
    """The checkpoint's modules behind each path that a linear may have: itself, or all that engines fuse."""
    behind = {module: (module,) for module in modules}
    for module in modules:
        fused = fused_module(f"{module}.weight")
        if fused is not None:
            behind[fused] = (*behind.get(fused, ()), module)
    return behind


def _prompt_amax(calibration: Calibration, parts: tuple[str, ...]) -> Tensor:
    """The amax of each prompt, [P] float32, the largest of all parts."""
    sites = [calibration.by_point[f"{part}.input"] for part in parts]
    return torch.stack([torch.from_numpy(values_of(site.prompt_amax)) for site in sites]).amax(0)


def _history(prompts: Tensor, weight: float, length: int) -> Tensor:
    """The history [length, 2]: the newest prompts, the newest last; zeros before them.

    Row 0 is where the next pass records its amax, so it stays zero, unless there is no other.
    """
    history = torch.zeros(length, 2)
    newest = prompts[-max(1, length - 1) :]
    history[length - len(newest) :, INPUT] = newest
    history[length - len(newest) :, WEIGHT] = weight
    return history


def write(seed: Seed, meta: Meta) -> None:
    """Write a seed into the state of a module, in place; what belongs to the output stays.

    Raises:
        ValueError: the state has another length of history.
    """
    if meta.amax_history.shape[0] != seed.amax_history.shape[0]:
        raise ValueError(f"the history has {meta.amax_history.shape[0]} rows, the seed {seed.amax_history.shape[0]}")
    with torch.no_grad():
        meta.amax_history[:, [INPUT, WEIGHT]] = seed.amax_history.to(meta.amax_history.device)
        meta.scale[[INPUT, WEIGHT]] = seed.scale.to(meta.scale.device)
        inverse = getattr(meta, "scale_inv", None)  # Transformer Engine 1.x keeps it beside the scale
        if isinstance(inverse, Tensor):
            inverse[[INPUT, WEIGHT]] = 1 / meta.scale[[INPUT, WEIGHT]]


def weight_amax_of(linear: nn.Module) -> float:
    """Return the largest magnitude of the weights of a linear, NaN if one of them is not finite."""
    weights = [parameter for parameter in linear.parameters(recurse=False) if parameter.ndim == 2]
    found = [float(weight.detach().abs().amax()) for weight in weights]
    return math.nan if any(map(math.isnan, found)) else max(found, default=0.0)


# ---------------------------------------------------------------- what touches Transformer Engine; not under test


def prewarm(
    model: nn.Module,
    calibration: Calibration,
    *,
    margin: int = 0,
    names: Mapping[str, Iterable[str]] | None = None,
    partial: bool = False,
) -> Seeds:
    """Seed every te.Linear and te.LayerNormLinear of a model; return what was written.

    Raises:
        ValueError: a linear was not calibrated (with `partial` it is only named in the result), or it has no state of
            DelayedScaling yet.
    """
    linears = linears_of(model)
    metas = {path: _meta_of(path, linear) for path, linear in linears.items()}
    lengths = {meta.amax_history.shape[0] for meta in metas.values()}
    if len(lengths) != 1:
        raise ValueError(f"the model has {len(linears)} linears, whose histories have {sorted(lengths)} rows")
    amax = {path: weight_amax_of(linear) for path, linear in linears.items()}
    found = seeds(calibration, amax, history_length=lengths.pop(), margin=margin, names=names)
    if found.missing and not partial:
        raise ValueError(f"the calibration saw nothing enter {', '.join(found.missing)}: give their names, or partial")
    for path, seed in found.by_module.items():
        write(seed, metas[path])
    return found


def linears_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules with one GEMM, by path; of te.LayerNormLinear the GEMM's input is what leaves the norm."""
    import transformer_engine.pytorch as te

    kinds = (te.Linear, te.LayerNormLinear)
    return {path: module for path, module in model.named_modules() if isinstance(module, kinds)}


def _meta_of(path: str, linear: Any) -> Meta:
    meta = linear.fp8_meta.get("scaling_fwd")
    if not isinstance(getattr(meta, "amax_history", None), Tensor):  # other recipes keep no history
        raise ValueError(f"{path} has no state yet: run one pass under autocast with the DelayedScaling recipe first")
    state: Meta = meta
    return state


def frozen_recipe(history_length: int = 1024, margin: int = 0) -> Any:
    """Return DelayedScaling whose update leaves scales as they are; the recipe of every pass, from the first on."""
    from transformer_engine.common.recipe import DelayedScaling

    return DelayedScaling(
        margin=margin, amax_history_len=history_length, scaling_factor_compute_algo=keep_scale, reduce_amax=False
    )


def keep_scale(amax: Tensor, scale: Tensor, fp8_max: Tensor, recipe: Any) -> Tensor:
    """Return the scale that is there already: a `scaling_factor_compute_algo`."""
    return scale


def autocast(recipe: Any) -> AbstractContextManager[Any]:
    """Return the context of an FP8 pass, under whichever of its two names this Transformer Engine has it."""
    import transformer_engine.pytorch as te

    if hasattr(te, "autocast"):  # since fp8_autocast is deprecated
        context: AbstractContextManager[Any] = te.autocast(enabled=True, calibrating=False, recipe=recipe)
    else:
        context = te.fp8_autocast(enabled=True, calibrating=False, fp8_recipe=recipe)
    return context
