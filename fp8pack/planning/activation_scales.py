"""From a calibration to the scales that are stored: of the input activations of each weight, and of the KV cache."""

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fp8pack.errors import InputError
from fp8pack.modelfacts.fused import fused_module
from fp8pack.modelfacts.patterns import ignoring, ignoring_all
from fp8pack.modelfacts.spec import Stored
from fp8pack.numerics.formats import E4M3, Float8Format
from fp8pack.numerics.rounding import ScaleRounding
from fp8pack.numerics.scaling import MIN_SCALE, scale_of
from fp8pack.planning.calibration import MIN_EXPERT_TOKENS, Calibration, Site, expert_of, values_of
from fp8pack.planning.recipe import ActivationOptions

NO_KV_CACHE = "leave out --kv-cache; unless activations are static, also --calibration"
Kind = Literal["input", "k", "v"]
Source = Literal["routed", "all_experts", "peers"]  # tokens routed here; all tokens; tokens of the other experts

_MAKES: dict[str, tuple[Kind, ...]] = {
    "attn.k": ("k",),
    "attn.v": ("v",),
    "attn.kv": ("k", "v"),
    "attn.qkv": ("k", "v"),
}
_LATENT = ("kv_a_proj_with_mqa", "kv_b_proj", "wkv_a", "wkv_b")  # of multi-head latent attention


@dataclass(frozen=True, slots=True)
class ActivationScale:
    """A calibrated scale that is stored with a weight: the multiplier that dequantizes, in float32.

    history: the amax of each prompt in order, the seed of a delayed-scaling history. source: the tokens it is from.
    """

    kind: Kind
    point: str
    stored: Stored
    scale: float
    amax: float
    history: tuple[float, ...]
    source: Source

    @property
    def data(self) -> bytes:
        """The bytes of the stored tensor."""
        return struct.pack("<f", self.scale)


@dataclass(frozen=True, slots=True)
class Observed:
    """The statistics of a point: amax by the options and of each prompt, its tokens, and whether it has outliers."""

    amax: float
    history: tuple[float, ...]
    source: Source
    has_spike: bool


class ActivationScales:
    """Scales from a calibration, under the names of a quant method."""

    def __init__(self, calibration: Calibration, options: ActivationOptions, format: Float8Format) -> None:
        if options.warmup >= len(calibration.prompts):
            prompts = len(calibration.prompts)
            raise InputError(f"warmup {options.warmup} skips all {prompts} prompts", "choose a smaller --warmup")
        self._calibration, self._options, self._format = calibration, options, format
        self._peers: dict[tuple[str, str], list[Site]] = {}
        for site in calibration.sites:
            for point in site.points:
                if key := expert_of(point):
                    self._peers.setdefault(key, []).append(site)

    def of_inputs(self, weights: Sequence[tuple[str, Stored]]) -> dict[str, tuple[ActivationScale, Observed]]:
        """Return the input scale of each weight; weights that engines fuse share the largest.

        weights: the name of each, and the stored tensor of its scale.

        Raises:
            InputError: the calibration has no input activations of a weight.
        """
        unseen = [name for name, _ in weights if self._is_unseen(f"{name.removesuffix('.weight')}.input")]
        if len(unseen) > 1:
            sentence = f"the calibration has no input activations of {len(unseen)} weights, such as {unseen[0]}"
            raise InputError(sentence, ignoring_all(unseen))
        found = {name: self.observed(f"{name.removesuffix('.weight')}.input", name) for name, _ in weights}
        groups: dict[str, list[Observed]] = {}
        for name, observed in found.items():
            groups.setdefault(fused_module(name) or name, []).append(observed)
        scales = {}
        for name, stored in weights:
            members = groups[fused_module(name) or name]
            amax = max(member.amax for member in members)
            history = tuple(map(max, zip(*(member.history for member in members), strict=True)))
            point = f"{name.removesuffix('.weight')}.input"
            scales[name] = (
                ActivationScale(
                    "input", point, stored, self._scale(amax, self._format), amax, history, found[name].source
                ),
                found[name],
            )
        return scales

    def of_kv_cache(
        self, roles: dict[str, str], stored_as: Callable[[str, Kind, str], Stored]
    ) -> dict[str, list[ActivationScale]]:
        """Return the scales of K and V of each attention, by the tensor that they are stored with.

        roles: of every tensor of the checkpoint. stored_as: from attention, kind and owner to the stored tensor.

        Raises:
            InputError: the calibration lacks K or V of an attention, or the model caches something else.
        """
        scales: dict[str, list[ActivationScale]] = {}
        for attention, owners in _attentions(roles).items():
            for kind, owner in owners.items():
                point = f"{attention}.{kind}"
                site = self._calibration.by_point.get(point)
                if site is None or not self._is_enough(site, is_expert=False):
                    raise InputError(f"the calibration has no {kind.upper()} of {attention}", NO_KV_CACHE)
                seen = self._of_sites([site], "routed")
                stored, scale = stored_as(attention, kind, owner), self._scale(seen.amax, E4M3)
                entry = ActivationScale(kind, point, stored, scale, seen.amax, seen.history, seen.source)
                scales.setdefault(owner, []).append(entry)
        if not scales:
            raise InputError("fp8pack finds no K and V projection in this model", NO_KV_CACHE)
        return scales

    def observed(self, point: str, weight: str) -> Observed:
        """Return the statistics of a point; experts with too few tokens use those of other experts."""
        site, expert = self._calibration.by_point.get(point), expert_of(point)
        if site is not None and self._is_enough(site, is_expert=expert is not None):
            return self._of_sites([site], "routed")
        if expert is not None:
            full = self._calibration.all_experts_by_point.get(point)
            if full is not None and self._is_enough(full, is_expert=True):
                return self._of_sites([full], "all_experts")
            if expert in self._peers:
                return self._of_sites(self._peers[expert], "peers")
        if site is None:
            raise InputError(f"the calibration has no input activations of {weight}", ignoring(weight))
        raise InputError(
            f"{weight} has input activations in the first {self._options.warmup} prompts only, which warmup skips",
            "choose a smaller --warmup",
        )

    def _is_unseen(self, point: str) -> bool:
        expert = expert_of(point)
        at_all = point in self._calibration.by_point or point in self._calibration.all_experts_by_point
        return not at_all and (expert is None or expert not in self._peers)

    def _is_enough(self, site: Site, *, is_expert: bool) -> bool:
        """Whether a site has enough statistics for a scale, also without the warmup."""
        after = site.prompt_amax[self._options.warmup :]
        reached = bool(after.size and after.max()) or not site.amax
        return reached and not (is_expert and site.tokens < MIN_EXPERT_TOKENS)

    def _of_sites(self, sites: list[Site], source: Source) -> Observed:
        options = self._options
        history = np.maximum.reduce([values_of(site.prompt_amax) for site in sites])[options.warmup :]
        amax = float(history.max())
        if options.percentile is not None:  # unless it is zero, as after a ReLU: then nothing is clipped
            amax = max(site.percentile(options.percentile) for site in sites) or amax
        return Observed(amax, tuple(history.tolist()), source, any(site.has_spike for site in sites))

    def _scale(self, amax: float, format: Float8Format) -> float:
        if amax == 0:
            return 1.0
        scale = scale_of(amax, format, ScaleRounding.NONE) * np.float32(2.0**self._options.margin)
        return float(max(scale, np.float32(MIN_SCALE)))


def _attentions(roles: dict[str, str]) -> dict[str, dict[Kind, str]]:
    """The attentions of a language model whose K and V are cached, and their projections."""
    found: dict[str, dict[Kind, str]] = {}
    for name, role in roles.items():
        attention, _, leaf = name.removesuffix(".weight").rpartition(".")
        if role not in _MAKES or not name.endswith(".weight") or leaf.startswith("in_proj"):  # of linear attention
            continue
        if leaf in _LATENT:
            raise InputError(f"{attention} caches a latent vector, for which fp8pack has no scale", NO_KV_CACHE)
        for kind in _MAKES[role]:
            found.setdefault(attention, {})[kind] = name
    return found
