"""Which devices torch sees here, and what each is: found out once and carried as a value."""

import re
from dataclasses import dataclass
from functools import cache

import torch

from fp8pack.errors import DeviceError

_HINT = "use device cpu"


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


def find_device(device: str | torch.device) -> torch.device:
    """Return a device that torch sees here; `cuda` becomes the current one, now and in every thread.

    Raises:
        DeviceError: torch does not know the name, or sees no device of this name or index.
    """
    try:
        found = torch.device(device)
    except RuntimeError:
        raise DeviceError(f"torch knows no device {device!r}", _HINT) from None
    if found.type in ("cpu", "meta"):
        return torch.device(found.type)
    count = _count(found.type)
    if count == 0:
        raise DeviceError(f"torch sees no {found.type.upper()} device here", _HINT)
    if found.index is not None and found.index >= count:
        last = f"{found.type}:{count - 1}"
        raise DeviceError(f"torch sees no {found} here: the last {found.type.upper()} device is {last}", _HINT)
    if found.type == "cuda" and found.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return found


def _count(kind: str) -> int:
    """How many devices of a kind torch sees; 0 where this build of torch has no module for the kind."""
    try:
        module = torch.get_device_module(kind)
    except RuntimeError:
        return 0
    return int(module.device_count()) if module.is_available() else 0


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
