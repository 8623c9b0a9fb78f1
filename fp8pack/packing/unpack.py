"""`unpack`: an FP8 checkpoint in, a BF16, FP16 or FP32 checkpoint out."""

from pathlib import Path
from typing import Any

from fp8pack.packing.facts import write_facts
from fp8pack.packing.prepare import WriteOptions, prepare_unpack
from fp8pack.packing.write import carry_out


def unpack(
    checkpoint: str | Path, dtype: str | None = None, options: WriteOptions | None = None, *, dry_run: bool = False
) -> dict[str, Any]:
    """Unpack an FP8 checkpoint; return what `fp8pack unpack --json` prints.

    checkpoint: of any convention that is read, by whomever it was made. dtype: bfloat16, float16 or float32,
        by default that of most weights before they were packed.
    Numerics: value = fp8 * scale in float32, rounded once to the dtype, to nearest even.

    Raises:
        Fp8PackError: in the kinds of errors.py, as `prepare_unpack` and `carry_out` say.
    """
    prepared = prepare_unpack(Path(checkpoint), dtype, options or WriteOptions())
    return write_facts(prepared, None if dry_run else carry_out(prepared), every_tensor=dry_run)
