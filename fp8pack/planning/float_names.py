"""The names of float dtypes, as people and config.json write them."""

from collections.abc import Sequence

from fp8pack.inputs import parse_choice

FLOAT_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
KEPT_DTYPES = ("bfloat16", "float16")
_ALIASES = {"bf16": "bfloat16", "fp16": "float16", "f16": "float16", "half": "float16"}
_ALIASES |= {"fp32": "float32", "f32": "float32", "float": "float32"}


def parse_float_name(name: str, value: object, choices: Sequence[str] = tuple(FLOAT_NAMES)) -> str:
    """Return a dtype such as `bfloat16` from text such as `bf16`; RecipeError if it is not among the choices."""
    return parse_choice(name, _ALIASES.get(str(value).lower(), value), tuple(choices))
