"""The options of an evaluation, without imports of torch or transformers."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fp8pack.calibration.options import DEVICES, STREAM_LAYERS
from fp8pack.errors import RecipeError
from fp8pack.inputs import (
    Duration,
    Texts,
    parse_choice,
    parse_count,
    parse_device,
    parse_dtype,
    parse_duration,
    parse_path,
    parse_switch,
    parse_texts,
)
from fp8pack.modelrun.prompts import HELD_OUT

ACTIVATIONS = ("declared", "none", "dynamic", "static")
FAIL_ON = ("interval", "point")
DEFAULT_TOKENS, LAYER_TOKENS = 32768, 4096
_DTYPES = ("float32", "bfloat16")
_MOST_TOKENS = 1 << 40


@dataclass(frozen=True, slots=True, init=False)
class EvalOptions:
    """The options of an evaluation, checked. max_length None: the model's limit, at most 2048.

    Raises:
        RecipeError: a value has a wrong type or is out of range.
    """

    text: tuple[str, ...]
    text_column: str | None
    num_tokens: int
    max_length: int | None
    activations: str
    dtype: str
    device: str
    trust_remote_code: bool
    stream_layers: str
    base: Path | None
    save_base: Path | None
    state: Path | None
    deadline: float | None

    def __init__(
        self,
        *,
        text: Texts = HELD_OUT,
        text_column: str | None = None,
        num_tokens: int | str | None = None,
        max_length: int | str | None = None,
        activations: str = "declared",
        dtype: str = "float32",
        device: str = "auto",
        trust_remote_code: bool = False,
        stream_layers: str = "auto",
        base: str | Path | None = None,
        save_base: str | Path | None = None,
        state: str | Path | None = None,
        deadline: Duration | None = None,
    ) -> None:
        put = partial(object.__setattr__, self)
        put("text", parse_texts("text", text) or (HELD_OUT,))
        put("text_column", text_column)
        count = DEFAULT_TOKENS if num_tokens is None else num_tokens
        put("num_tokens", parse_count("num_tokens", count, least=2, most=_MOST_TOKENS))
        put("max_length", None if max_length is None else parse_count("max_length", max_length, least=2))
        put("activations", parse_choice("activations", activations, ACTIVATIONS))
        put("dtype", parse_dtype("dtype", dtype, _DTYPES))
        put("device", parse_device(device, DEVICES))
        put("trust_remote_code", parse_switch("trust_remote_code", trust_remote_code))
        put("stream_layers", parse_choice("stream_layers", stream_layers, STREAM_LAYERS))
        put("base", None if base is None else parse_path("base", base))
        put("save_base", None if save_base is None else parse_path("save_base", save_base))
        put("state", None if state is None else parse_path("state", state))
        put("deadline", None if deadline is None else parse_duration("deadline", deadline))
        if self.base and self.save_base:
            raise RecipeError("a base is either used or saved", "leave out --base or --save-base")
        if self.deadline is not None and self.state is None:
            raise RecipeError("a deadline needs a place for what is done", "--state DIR")
        if self.stream_layers == "off" and (self.base or self.save_base or self.state):
            raise RecipeError("base and state hold hidden states between layers", "leave out --stream-layers off")
