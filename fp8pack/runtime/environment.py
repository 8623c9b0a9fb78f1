"""What this machine multiplies FP8 with: versions, devices, and each back end tried on each kind of scales."""

import platform
from importlib import metadata
from typing import Any

import torch

from fp8pack import __version__
from fp8pack.gemm.choose import candidates, prove
from fp8pack.gemm.device import describe
from fp8pack.gemm.scheme import TRIED_GRANULARITIES, GemmScheme, scheme_of
from fp8pack.numerics.formats import E4M3
from fp8pack.numerics.granularity import CHANNEL

_PACKAGES = ("torch", "triton", "transformers", "safetensors", "numba", "nvmath-python")


def environment() -> dict[str, Any]:
    """Return what `fp8pack env --json` prints; every back end that should serve multiplies small matrices first."""
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    return {
        "fp8pack": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "cuda": torch.version.cuda,
        "rocm": torch.version.hip,
        "devices": [_device(device) for device in devices],
    }


def _device(device: torch.device) -> dict[str, Any]:
    facts = describe(device)
    schemes = [scheme_of(E4M3, granularity) for granularity in TRIED_GRANULARITIES]
    return {
        "device": str(device),
        "name": facts.name,
        "capability": f"SM{facts.capability[0]}{facts.capability[1]}" if facts.kind == "cuda" else facts.arch or None,
        "products": [_product(scheme, device) for scheme in (*schemes, scheme_of(E4M3, CHANNEL, weight_only=True))],
    }


def _product(scheme: GemmScheme, device: torch.device) -> dict[str, Any]:
    """The back end that serves a scheme, and why each other does not: null where it would, too."""
    tried = {
        candidate.backend.name: candidate.problem or prove(candidate.backend, scheme, device)
        for candidate in candidates(scheme, describe(device))
    }
    serving = [name for name, problem in tried.items() if problem is None]
    return {
        "granularity": scheme.granularity.name,
        "activations": None if scheme.activation is None else scheme.activation.name,
        "back_end": serving[0] if serving else None,
        "tried": tried,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
