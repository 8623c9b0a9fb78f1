"""Text for a terminal: safe and short."""

import re

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(line: str) -> str:
    """Return a line whose control characters, line breaks and changes of direction are escaped."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape", "backslashreplace").decode(), line)


def shorten(name: str, width: int) -> str:
    """Return a name of at most `width` characters: what is too long is cut in the middle."""
    if len(name) <= width:
        return name
    tail = (width - 1) * 2 // 3  # the end of a name says more than its beginning
    return f"{name[: width - 1 - tail]}…{name[-tail:]}"


def listed(names: list[str], most: int = 3) -> str:
    """Return the first of several names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
