"""Byte counts and durations as people write them."""

import re

from fp8pack.errors import RecipeError

_SIZES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600}


def ceil_div(a: int, b: int) -> int:
    """Return a / b rounded up."""
    return -(-a // b)


def round_up(a: int, multiple: int) -> int:
    """Return a, or the next multiple of a number above it."""
    return ceil_div(a, multiple) * multiple


def parse_size(text: str) -> int:
    """Return the bytes of a size such as `5GB` (decimal), `256MiB` (binary) or `4096`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", text.upper())
    if match is None or match[2] not in _SIZES:
        raise RecipeError(f"size {text!r} is not understood: write 5GB, 256MiB or a number of bytes")
    return int(float(match[1]) * _SIZES[match[2]])


def parse_duration(text: str) -> float:
    """Return the seconds of a duration such as `50m`, `1.5h`, `90s` or `90`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smh]?)\s*", text)
    if match is None:
        raise RecipeError(f"duration {text!r} is not understood: write 50m, 1.5h or 90s")
    return float(match[1]) * _SECONDS[match[2]]


def format_size(nbytes: float) -> str:
    """Return a byte count in decimal units with three digits, as disks and the Hub count them."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(nbytes) < 1000 or unit == "GB":
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.{2 if unit == 'GB' else 1}f} {unit}"
        nbytes /= 1000
    raise AssertionError


def format_seconds(seconds: float) -> str:
    """Return a duration as `12.3 s`, `4 min 10 s` or `2 h 5 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
