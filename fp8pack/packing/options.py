"""How a checkpoint is written, as asked."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fp8pack.inputs import (
    Duration,
    Size,
    Texts,
    parse_count,
    parse_device,
    parse_duration,
    parse_path,
    parse_size,
    parse_switch,
    parse_texts,
)
from fp8pack.planning.sizes import SIZES, Sizes

DEFAULT_MEMORY = "256MiB"
MAX_WORKERS = 4096
_DEVICES = ("cpu", "cuda", "torch:cpu")


@dataclass(frozen=True, slots=True, init=False)
class WriteOptions:
    """How to write; only `max_shard_size` and `copy` change what the output holds. None stands for the default.

    Sizes and times may be given as text: `max_memory="1GiB"`, `deadline="50m"`. max_memory, max_shard_size are stored
    in bytes, deadline in seconds. `sizes` is for tests, and no option of a command.

    Raises:
        RecipeError: a value is not of its kind, or out of range.
    """

    output: Path | None
    workers: int | None
    max_memory: int
    max_shard_size: int | None
    device: str
    copy: tuple[str, ...]
    resume: bool
    overwrite: bool
    deadline: float | None
    sizes: Sizes

    def __init__(
        self,
        output: str | Path | None = None,
        *,
        workers: int | str | None = None,
        max_memory: Size | None = DEFAULT_MEMORY,
        max_shard_size: Size | None = None,
        device: str = "cpu",
        copy: Texts = (),
        resume: bool = True,
        overwrite: bool = False,
        deadline: Duration | None = None,
        sizes: Sizes | None = None,
    ) -> None:
        put = partial(object.__setattr__, self)
        put("output", None if output is None else parse_path("output", output))
        put("workers", None if workers is None else parse_count("workers", workers, least=1, most=MAX_WORKERS))
        put("max_memory", parse_size("max_memory", DEFAULT_MEMORY if max_memory is None else max_memory))
        put("max_shard_size", None if max_shard_size is None else parse_size("max_shard_size", max_shard_size))
        put("device", parse_device(device, _DEVICES))
        put("copy", parse_texts("copy", copy))
        put("resume", parse_switch("resume", resume))
        put("overwrite", parse_switch("overwrite", overwrite))
        put("deadline", None if deadline is None else parse_duration("deadline", deadline))
        put("sizes", SIZES if sizes is None else sizes)
