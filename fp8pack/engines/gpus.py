"""The GPUs that a target can be, and their architectures."""

import re
from dataclasses import dataclass

from fp8pack.inputs import unknown


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU: `arch` is `sm90` for NVIDIA's compute capability 9.0, `gfx942` for AMD."""

    name: str
    arch: str

    @property
    def capability(self) -> str:
        """The architecture as its vendor writes it: `9.0`, `gfx942`."""
        digits = self.arch.removeprefix("sm")
        return self.arch if digits == self.arch else f"{digits[:-1]}.{digits[-1]}"

    @property
    def wants_powers_of_two(self) -> bool:
        """Whether DeepGEMM takes block scales as powers of two only: on SM100 and its kin, SM120 runs other kernels."""
        return self.arch.startswith("sm10")


# architecture -> product names without vendor, memory and form factor
_NAMES = {
    "sm70": "V100",
    "sm75": "T4",
    "sm80": "A100 A800 A30",
    "sm86": "A10 A10G A40 A6000 RTX3090",
    "sm89": "L4 L20 L40 L40S RTX4090 RTX6000Ada",
    "sm90": "H100 H200 H800 H20 GH200",
    "sm100": "B200 GB200",
    "sm103": "B300 GB300",
    "sm120": "RTX5090 RTXPro6000",
    "sm121": "GB10",
    "gfx942": "MI300X MI300A MI308X MI325X",
    "gfx950": "MI350X MI355X",
}
BEFORE_ADA = ("sm75", "sm80", "sm86")
BEFORE_SM100 = (*BEFORE_ADA, "sm89", "sm90")
GPUS = {name.lower(): Gpu(name, arch) for arch, names in _NAMES.items() for name in names.split()}
_NO_PART_OF_A_NAME = re.compile(r"nvidia|geforce|tesla|amd|instinct|sxm\d?|pcie|nvl|hbm\d\w*|\d+gi?b")


def parse_gpu(text: str | None) -> Gpu | None:
    """Return the GPU of a name such as `h100`, `RTX 4090` or `NVIDIA H100 80GB HBM3`; None for None.

    Raises:
        RecipeError: the name is not known.
    """
    if text is None:
        return None
    if not isinstance(text, str):
        raise unknown("gpu", text, tuple(GPUS))
    words = re.split(r"[\s_-]+", text.strip().lower())
    gpu = GPUS.get("".join(word for word in words if not _NO_PART_OF_A_NAME.fullmatch(word)))
    if gpu is None:
        raise unknown("gpu", text, tuple(GPUS))
    return gpu
