"""How to calibrate, as asked; nothing heavy is imported for it."""

from dataclasses import dataclass
from pathlib import Path

from fp8pack.errors import RecipeError
from fp8pack.modelrun.prompts import BUILT_IN

FEWEST_PROMPTS, DEFAULT_PROMPTS, MOST_PROMPTS = 128, 256, 512
STREAM_LAYERS = ("auto", "on", "off")


@dataclass(frozen=True, slots=True)
class CalibrateOptions:
    """How to calibrate. None stands for the default: max_length for the model's, 2048 at most."""

    output: Path | None = None
    prompts: str = BUILT_IN
    num_prompts: int = DEFAULT_PROMPTS
    max_length: int | None = None
    batch_size: int = 1
    all_experts: bool = False
    until_converged: bool = False
    stream_layers: str = "auto"
    device: str = "auto"
    trust_remote_code: bool = False
    resume: bool = True
    overwrite: bool = False
    deadline_seconds: float | None = None

    def __post_init__(self) -> None:
        if min(self.num_prompts, self.batch_size, 1 if self.max_length is None else self.max_length) < 1:
            raise RecipeError("--num-prompts, --batch-size and --max-length are at least 1")
        if self.stream_layers not in STREAM_LAYERS:
            raise RecipeError(f"--stream-layers {self.stream_layers!r} is not known: choose auto, on or off")
