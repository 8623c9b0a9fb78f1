"""`pack`: a BF16, FP16 or FP32 checkpoint in, an FP8 checkpoint out."""

from pathlib import Path
from typing import Any

from fp8pack.packing.facts import write_facts
from fp8pack.packing.prepare import WriteOptions, prepare_pack
from fp8pack.packing.write import carry_out
from fp8pack.planning.recipe import Request


def pack(
    model: str | Path, request: Request | None = None, options: WriteOptions | None = None, *, dry_run: bool = False
) -> dict[str, Any]:
    """Pack a checkpoint; return what `fp8pack pack --json` prints.

    model: a directory, a `.safetensors` file, or the id of a repository in the hub cache.

    Raises:
        Fp8PackError: in the kinds of errors.py, as `prepare_pack` and `carry_out` say.
    """
    prepared = prepare_pack(Path(model), request or Request(), options or WriteOptions())
    return write_facts(prepared, None if dry_run else carry_out(prepared), every_tensor=dry_run)
