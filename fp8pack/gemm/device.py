"""The devices that torch finds on this machine, and the facts of each, as one value."""

import re
from dataclasses import dataclass
from functools import cache

import torch

from fp8pack.errors import DeviceError
from fp8pack.machine import usable_memory

_HINT = "use --device cpu"


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """The facts of a device that FP8 depends on.

    kind: `cpu`, `cuda` (NVIDIA), `hip` (AMD) or torch's name for another. capability: of NVIDIA only; (9, 0) is Hopper.
    arch: of AMD only, such as `gfx942`. toolkit: version of CUDA or ROCm that torch was built with.
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


def choose_device(name: str) -> torch.device:
    """Return the device of a name; `auto` is a GPU where there is one. Raises as `find_device` does."""
    return find_device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def find_device(device: str | torch.device) -> torch.device:
    """Return a device that torch finds here; `cuda` becomes the current one with its index, for every thread.

    Raises:
        DeviceError: torch does not know the name, or finds no device of this name or index.
    """
    try:
        found = torch.device(device)
    except RuntimeError:
        raise DeviceError(f"unknown device {device!r}", _HINT) from None
    if found.type in ("cpu", "meta"):
        return torch.device(found.type)
    count = _count(found.type)
    if count == 0:
        raise DeviceError(f"torch finds no {found.type.upper()} device", _HINT)
    if found.index is not None and found.index >= count:
        last = f"{found.type}:{count - 1}"
        raise DeviceError(f"torch finds no device {found}; the last {found.type.upper()} device is {last}", _HINT)
    if found.type == "cuda" and found.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return found


def free_memory(device: torch.device) -> int:
    """Return the free bytes of the device's memory, or of this machine's for a CPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else usable_memory()


def _count(kind: str) -> int:
    """Number of devices of a kind; 0 if this build of torch has no module for the kind."""
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
