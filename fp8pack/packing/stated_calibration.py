"""The calibration that a manifest speaks of, as far as its scales of activations show it."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fp8pack.planning.calibration import MIN_EXPERT_TOKENS, Calibration, Site


def stated_calibration(document: Mapping[str, Any]) -> Calibration:
    """Return a calibration from which packing takes the very scales of activations that a manifest states."""
    recipe = document["recipe"]
    warmup = int(recipe["warmup"])
    entries = [(entry["source"], _site(entry, warmup)) for entry in _activations(document)]
    prompts = max((site.prompt_amax.size for _, site in entries), default=warmup + 1)
    return Calibration(
        fingerprint="",
        prompts=("",) * prompts,
        options={},
        sites=tuple(site for source, site in entries if source != "all_experts"),
        all_experts=tuple(site for source, site in entries if source == "all_experts"),
        digest=recipe["calibration"],
    )


def _activations(document: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for entry in document["tensors"].values():
        yield from entry.get("activation_scales", ())


def _site(entry: Mapping[str, Any], warmup: int) -> Site:
    history = _magnitudes([0.0] * warmup + entry["amax_history_seed"])
    amax = _magnitudes([entry["amax"]] if entry["amax"] else [])
    return Site(
        points=(entry["point"],),
        tokens=0 if entry["source"] == "peers" else MIN_EXPERT_TOKENS,  # too few: peers of it, and itself, are asked
        bins=amax,
        counts=np.ones(amax.size, np.int64),
        channel_amax=amax,
        channel_squares=np.zeros(amax.size),
        prompt_amax=history,
    )


def _magnitudes(values: list[float]) -> NDArray[np.uint16]:
    return (np.array(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)
