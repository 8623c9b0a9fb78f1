"""The options of a calibration, without imports of torch or transformers."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fp8pack.inputs import (
    Duration,
    Texts,
    parse_choice,
    parse_count,
    parse_device,
    parse_duration,
    parse_path,
    parse_switch,
    parse_texts,
)
from fp8pack.modelrun.prompts import BUILT_IN

FEWEST_PROMPTS, DEFAULT_PROMPTS, MOST_PROMPTS = 128, 256, 512
DEVICES = ("auto", "cpu", "cuda")
SECOND_MOMENTS = ("none", "blocks", "full")
STREAM_LAYERS = ("auto", "on", "off")


def moment_options(second_moments: str) -> dict[str, str]:
    """Return what a calibration says of second moments among its options: nothing if it has none."""
    return {} if second_moments == "none" else {"second_moments": second_moments}


@dataclass(frozen=True, slots=True, init=False)
class CalibrateOptions:
    """The options of a calibration, checked. max_length None: the model's limit, at most 2048.

    Raises:
        RecipeError: a value has a wrong type or is out of range.
    """

    output: Path | None
    prompts: tuple[str, ...]
    text_column: str | None
    num_prompts: int
    max_length: int | None
    batch_size: int
    all_experts: bool
    second_moments: str
    until_converged: bool
    stream_layers: str
    device: str
    trust_remote_code: bool
    resume: bool
    overwrite: bool
    deadline: float | None

    def __init__(
        self,
        *,
        output: str | Path | None = None,
        prompts: Texts = BUILT_IN,
        text_column: str | None = None,
        num_prompts: int | str = DEFAULT_PROMPTS,
        max_length: int | str | None = None,
        batch_size: int | str = 1,
        all_experts: bool = False,
        second_moments: str = "none",
        until_converged: bool = False,
        stream_layers: str = "auto",
        device: str = "auto",
        trust_remote_code: bool = False,
        resume: bool = True,
        overwrite: bool = False,
        deadline: Duration | None = None,
    ) -> None:
        put = partial(object.__setattr__, self)
        put("output", None if output is None else parse_path("output", output))
        put("prompts", parse_texts("prompts", prompts) or (BUILT_IN,))
        put("text_column", text_column)
        put("num_prompts", parse_count("num_prompts", num_prompts, least=1))
        put("max_length", None if max_length is None else parse_count("max_length", max_length, least=1))
        put("batch_size", parse_count("batch_size", batch_size, least=1))
        put("all_experts", parse_switch("all_experts", all_experts))
        put("second_moments", parse_choice("second_moments", second_moments, SECOND_MOMENTS))
        put("until_converged", parse_switch("until_converged", until_converged))
        put("stream_layers", parse_choice("stream_layers", stream_layers, STREAM_LAYERS))
        put("device", parse_device(device, DEVICES))
        put("trust_remote_code", parse_switch("trust_remote_code", trust_remote_code))
        put("resume", parse_switch("resume", resume))
        put("overwrite", parse_switch("overwrite", overwrite))
        put("deadline", None if deadline is None else parse_duration("deadline", deadline))
