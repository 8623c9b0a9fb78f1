"""The FP8 support of this machine: versions, devices, and each backend tried with each granularity."""

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata

import torch

from fp8pack import __version__
from fp8pack.documents import Document
from fp8pack.gemm.choose import candidates, verify
from fp8pack.gemm.device import describe
from fp8pack.gemm.scheme import TRIED_GRANULARITIES, GemmScheme, scheme_of
from fp8pack.numerics.formats import E4M3
from fp8pack.numerics.granularity import CHANNEL

_PACKAGES = ("torch", "triton", "transformers", "safetensors", "numba", "nvmath-python")


@dataclass(frozen=True, slots=True)
class GemmSupport:
    """The backend for a granularity on a device.

    granularity: of the weight. activations: their granularity, None if they are not quantized. backend: None if no
    backend works. tried: backend -> why it does not work, None if it does.
    """

    granularity: str
    activations: str | None
    backend: str | None
    tried: Mapping[str, str | None]


@dataclass(frozen=True, slots=True)
class DeviceEnvironment:
    """A device by torch's name, and its GEMMs. capability: `SM90`, or AMD's `gfx942`; None for a CPU."""

    device: str
    name: str
    capability: str | None
    gemms: tuple[GemmSupport, ...]


@dataclass(frozen=True, slots=True, repr=False)
class Environment(Document):
    """The FP8 support of this machine.

    packages: versions, None if not installed. cuda, rocm: versions of torch's build. devices: the CPU, then GPUs.
    """

    fp8pack: str
    python: str
    platform: str
    packages: Mapping[str, str | None]
    cuda: str | None
    rocm: str | None
    devices: tuple[DeviceEnvironment, ...]


def environment() -> Environment:
    """Return the FP8 support of this machine; every backend that should work is verified with a small GEMM."""
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    return Environment(
        fp8pack=__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        packages={name: _version(name) for name in _PACKAGES},
        cuda=torch.version.cuda,
        rocm=torch.version.hip,
        devices=tuple(_device(device) for device in devices),
    )


def _device(device: torch.device) -> DeviceEnvironment:
    facts = describe(device)
    schemes = [scheme_of(E4M3, granularity) for granularity in TRIED_GRANULARITIES]
    return DeviceEnvironment(
        device=str(device),
        name=facts.name,
        capability=f"SM{facts.capability[0]}{facts.capability[1]}" if facts.kind == "cuda" else facts.arch or None,
        gemms=tuple(_gemm(scheme, device) for scheme in (*schemes, scheme_of(E4M3, CHANNEL, weight_only=True))),
    )


def _gemm(scheme: GemmScheme, device: torch.device) -> GemmSupport:
    tried = {
        candidate.backend.name: candidate.problem or verify(candidate.backend, scheme, device)
        for candidate in candidates(scheme, describe(device))
    }
    return GemmSupport(
        granularity=scheme.granularity.name,
        activations=None if scheme.activation is None else scheme.activation.name,
        backend=next((name for name, problem in tried.items() if problem is None), None),
        tried=tried,
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
