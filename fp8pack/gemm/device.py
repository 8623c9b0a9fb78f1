"""What a device is, found out once and carried as a value."""

import re
from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """A device as far as FP8 depends on it.

    kind: `cpu`, `cuda` (NVIDIA), `hip` (AMD) or torch's name of any other. capability: (9, 0) is Hopper; of NVIDIA
    only. arch: `gfx942`; of AMD only. toolkit: version of CUDA or ROCm that torch was built with.
    """

    kind: str
    name: str = ""
    capability: tuple[int, int] = (0, 0)
    arch: str = ""
    toolkit: tuple[int, ...] = ()

    @property
    def is_fnuz(self) -> bool:
        """Whether its E4M3 is the FNUZ variant: bias 8, no minus zero (AMD CDNA 3 ISA, section on FP8)."""
        return self.arch.startswith(("gfx940", "gfx941", "gfx942"))


@cache
def describe(device: torch.device) -> DeviceFacts:
    """Return the facts of a device."""
    if device.type != "cuda":
        return DeviceFacts(device.type)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        arch = str(properties.gcnArchName).partition(":")[0]
        return DeviceFacts("hip", properties.name, arch=arch, toolkit=_version(torch.version.hip))
    capability = (properties.major, properties.minor)
    return DeviceFacts("cuda", properties.name, capability, toolkit=_version(torch.version.cuda))


def _version(text: str | None) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text or "")[:2])
