"""The options of an evaluation, without imports of torch or transformers."""

from dataclasses import dataclass
from functools import partial

from fp8pack.inputs import Texts, parse_choice, parse_count, parse_device, parse_dtype, parse_switch, parse_texts
from fp8pack.modelrun.prompts import HELD_OUT

ACTIVATIONS = ("declared", "none", "dynamic", "static")
FAIL_ON = ("interval", "point")
DEFAULT_TOKENS = 32768
_DEVICES = ("auto", "cpu", "cuda")
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

    def __init__(
        self,
        *,
        text: Texts = HELD_OUT,
        text_column: str | None = None,
        num_tokens: int | str = DEFAULT_TOKENS,
        max_length: int | str | None = None,
        activations: str = "declared",
        dtype: str = "float32",
        device: str = "auto",
        trust_remote_code: bool = False,
    ) -> None:
        put = partial(object.__setattr__, self)
        put("text", parse_texts("text", text) or (HELD_OUT,))
        put("text_column", text_column)
        put("num_tokens", parse_count("num_tokens", num_tokens, least=2, most=_MOST_TOKENS))
        put("max_length", None if max_length is None else parse_count("max_length", max_length, least=2))
        put("activations", parse_choice("activations", activations, ACTIVATIONS))
        put("dtype", parse_dtype("dtype", dtype, _DTYPES))
        put("device", parse_device(device, _DEVICES))
        put("trust_remote_code", parse_switch("trust_remote_code", trust_remote_code))
