"""`convert`: an FP8 checkpoint in, an FP8 checkpoint of another convention, granularity or format out."""

from pathlib import Path
from typing import Any

from fp8pack.packing.facts import write_facts
from fp8pack.packing.prepare import WriteOptions, prepare_convert
from fp8pack.packing.write import carry_out
from fp8pack.planning.recipe import Request


def convert(
    checkpoint: str | Path, request: Request, options: WriteOptions | None = None, *, dry_run: bool = False
) -> dict[str, Any]:
    """Convert an FP8 checkpoint; return what `fp8pack convert --json` prints.

    checkpoint: of any convention that is read, by whomever it was made. What the request leaves open stays as the
        source has it. FP8 bytes are carried over untouched where every region of the output lies within one of the
        source; elsewhere they are dequantized to float32 and quantized anew.

    Raises:
        Fp8PackError: in the kinds of errors.py, as `prepare_convert` and `carry_out` say.
    """
    prepared = prepare_convert(Path(checkpoint), request, options or WriteOptions())
    return write_facts(prepared, None if dry_run else carry_out(prepared), every_tensor=dry_run)
