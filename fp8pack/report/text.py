"""Text from files, made safe for a terminal."""

import re

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(line: str) -> str:
    """Return a line whose control characters, line breaks and changes of direction are escaped."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape", "backslashreplace").decode(), line)
