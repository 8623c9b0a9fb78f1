"""Changes that make a checkpoint hostile, and a look at what lies on disk."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fp8pack.packing.pack import pack

Refused = Callable[..., str]
Cli = Callable[..., subprocess.CompletedProcess[str]]
Change = Callable[[dict[str, Any]], None]
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
NAME = "model.layers.0.mlp.down_proj.weight"


def points_to(value: Any) -> Change:
    """Return a change of an index: one tensor is said to lie there."""

    def change(index: dict[str, Any]) -> None:
        index["weight_map"][NAME] = value

    return change


def files_of(folder: Path) -> dict[str, bytes]:
    """Return every file of a directory with its bytes."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pack_into(model: Path, output: Path, **options: Any) -> dict[str, Any]:
    """Pack with no request of our own."""
    return pack(model, output, **options)
