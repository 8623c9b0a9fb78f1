"""Values as people type them, in Python or in a shell: numbers, sizes, times, choices, lists.

Each function takes the name of the option, accepts loosely and returns strictly. What is wrong gets the same sentence
wherever it was typed.

Raises (all of them):
    RecipeError: the value is not of its kind, or out of range.
"""

import math
import os
import re
from collections.abc import Iterable, Sequence
from datetime import timedelta
from difflib import get_close_matches
from pathlib import Path

from fp8pack.errors import RecipeError

Size = int | str
Duration = float | str | timedelta
Texts = str | Iterable[str]
Paths = str | Path | Iterable[str | Path]

_SIZES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_DTYPE_ALIASES = {"bf16": "bfloat16", "fp16": "float16", "f16": "float16", "half": "float16"}
_DTYPE_ALIASES |= {"fp32": "float32", "f32": "float32", "float": "float32"}
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600}


def parse_count(name: str, value: object, *, least: int = 0, most: int | None = None) -> int:
    """Return a whole number from `least` to `most`; text is read as a decimal number."""
    number = value if isinstance(value, int) and not isinstance(value, bool) else None
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d{1,18}\s*", value):
        number = int(value)
    if number is None or number < least or (most is not None and number > most):
        span = f"from {least} to {most}" if most is not None else f"of at least {least}"
        raise RecipeError(f"{_words(name)} {value!r} is not a whole number {span}")
    return number


def parse_number(name: str, value: object, *, above: float, most: float) -> float:
    """Return a number above one bound and at most another."""
    try:
        number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except ValueError:
        number = math.nan
    if not above < number <= most:
        raise RecipeError(f"{_words(name)} {value!r} is not a number above {above:g} and at most {most:g}")
    return number


def parse_switch(name: str, value: object) -> bool:
    """Return True or False."""
    if not isinstance(value, bool):
        raise RecipeError(f"{_words(name)} {value!r} is neither True nor False")
    return value


def parse_choice(name: str, value: object, choices: Sequence[str]) -> str:
    """Return one of the choices, named in any case and with `_` or a space for `-`."""
    by_key = {_key(choice): choice for choice in choices}
    found = by_key.get(_key(value)) if isinstance(value, str) else None
    if found is None:
        raise unknown(name, value, choices)
    return found


def parse_dtype(name: str, value: object, choices: Sequence[str]) -> str:
    """Return a dtype as torch spells it; `bf16`, `fp16`, `half` and the like are taken, too."""
    return parse_choice(name, _DTYPE_ALIASES.get(str(value).lower(), value), choices)


def parse_texts(name: str, value: object, *, commas: bool = False) -> tuple[str, ...]:
    """Return a list of texts; one text is a list of one. commas: whether each may be several, separated by commas."""
    texts = [value] if isinstance(value, str) else list(value) if isinstance(value, Iterable) else None
    if texts is None or not all(isinstance(text, str) and text.strip() for text in texts):
        raise RecipeError(f"{_words(name)} {value!r} is not a text or a list of texts")
    parts = [part for text in texts for part in (text.split(",") if commas else [text])]
    return tuple(part.strip() if commas else part for part in parts if part.strip())


def parse_paths(name: str, value: object) -> tuple[Path, ...]:
    """Return paths; one is a list of one."""
    if isinstance(value, str | os.PathLike) or not isinstance(value, Iterable):
        return (parse_path(name, value),)
    return tuple(parse_path(name, each) for each in value)


def parse_path(name: str, value: object) -> Path:
    """Return a path; `~` is the home directory."""
    if not isinstance(value, str | os.PathLike) or not isinstance(text := os.fspath(value), str) or not text:
        raise RecipeError(f"{_words(name)} {value!r} is not a path")
    if "\0" in text:
        raise RecipeError(f"{_words(name)} {value!r} contains a zero byte, which no path can")
    return Path(text).expanduser() if text.startswith("~") else Path(text)


def parse_size(name: str, value: object, *, least: int = 1) -> int:
    """Return the bytes of a size such as `5GB` (decimal), `256MiB` (binary) or 4096."""
    if isinstance(value, str) and (match := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", value.upper())):
        nbytes = int(float(match[1]) * _SIZES[match[2]]) if match[2] in _SIZES else -1
    else:
        nbytes = value if isinstance(value, int) and not isinstance(value, bool) else -1
    if nbytes < least:
        raise RecipeError(f"{_words(name)} {value!r} is not a size", "write 5GB, 256MiB or a number of bytes")
    return nbytes


def parse_duration(name: str, value: object) -> float:
    """Return the seconds of a duration such as `50m`, `1.5h`, `90s`, 90 or a timedelta."""
    seconds = -1.0
    if isinstance(value, timedelta):
        seconds = value.total_seconds()
    elif isinstance(value, int | float) and not isinstance(value, bool):
        seconds = float(value)
    elif isinstance(value, str) and (match := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smh]?)\s*", value)):
        seconds = float(match[1]) * _SECONDS[match[2]]
    if not 0 <= seconds < math.inf:
        raise RecipeError(f"{_words(name)} {value!r} is not a duration", "write 50m, 1.5h, 90s or a number of seconds")
    return seconds


def parse_device(value: object, kinds: Sequence[str]) -> str:
    """Return the name of a device, in lower case; cuda may have an index: `cuda:1`."""
    text = str(value).strip().lower()
    if text not in kinds and not ("cuda" in kinds and re.fullmatch(r"cuda:\d+", text)):
        raise unknown("device", value, [kind for kind in kinds if ":" not in kind])
    return text


def unknown(name: str, value: object, choices: Sequence[str]) -> RecipeError:
    """Return the error of a value that is none of the choices, with the nearest one and all of them."""
    near = get_close_matches(value.lower(), [choice.lower() for choice in choices], 1) if isinstance(value, str) else []
    guess = next((choice for choice in choices if near and choice.lower() == near[0]), None)
    return RecipeError(
        f"{_words(name)} {value!r} is not known" + (f": did you mean {guess!r}?" if guess else ""),
        f"choose {', '.join(choices)}",
    )


def _words(name: str) -> str:
    return name.replace("_", " ")


def _key(text: str) -> str:
    return text.strip().lower().replace("_", "-").replace(" ", "-")
