"""Pack BF16 checkpoints into FP8, offline, and load the result into device buffers.

The public names are resolved when they are first used, so that `import fp8pack` costs nothing. On another system than
Linux that is an Fp8PackError.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "CalibrateOptions": "fp8pack.calibration.options",
    "Fp8PackError": "fp8pack.errors",
    "FP8Linear": "fp8pack.runtime.linear",
    "PackedCheckpoint": "fp8pack.runtime.packed_checkpoint",
    "PackedTensor": "fp8pack.runtime.packed_tensor",
    "Request": "fp8pack.planning.recipe",
    "WriteOptions": "fp8pack.packing.prepare",
    "calibrate": "fp8pack.calibration.calibrate",
    "convert": "fp8pack.packing.convert",
    "diff": "fp8pack.reading.diff",
    "inspect": "fp8pack.reading.inspect",
    "linear": "fp8pack.runtime.linear",
    "load_model": "fp8pack.runtime.model",
    "load_packed": "fp8pack.runtime.load",
    "merge": "fp8pack.calibration.merge",
    "observe": "fp8pack.calibration.observers",
    "pack": "fp8pack.packing.pack",
    "report_fp8": "fp8pack.runtime.report_fp8",
    "unpack": "fp8pack.packing.unpack",
}
__all__ = ["__version__", *_PUBLIC]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        if name != "Fp8PackError":
            import_module("fp8pack.machine").check_system()
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'fp8pack' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
