"""Byte counts and durations as text, the order of names, and rounding of counts."""

import re


def ceil_div(a: int, b: int) -> int:
    """Return a / b rounded up."""
    return -(-a // b)


def round_up(a: int, multiple: int) -> int:
    """Return the smallest multiple that is not below a."""
    return ceil_div(a, multiple) * multiple


def format_size(nbytes: float) -> str:
    """Return a byte count in decimal units, as disks and the Hub count them."""
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


def natural(name: str) -> list[tuple[int, str]]:
    """Return the key that sorts layer 2 before layer 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]
