"""The journal of an unfinished calibration, with which the same command continues."""

import json
import os
from pathlib import Path
from typing import Any

from fp8pack.checkpoint.shard_writer import writing
from fp8pack.errors import OutputError
from fp8pack.regular_files import read_regular

_VERSION = 1
_HEAD = {
    "fingerprint": "of another model",
    "prompts": "with other prompts",
    "options": "with other options",
    "streamed": "with other layer streaming",
}


class CalibrationJournal:
    """The journal of a calibration: a head that identifies it, then a line for each finished unit of work on disk."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.done = 0

    def resume(self, head: dict[str, Any], *, throw_away: bool) -> int:
        """Return the number of finished units of this calibration; 0 starts from the beginning.

        Raises:
            OutputError: the journal is of another model, or of other prompts or options.
        """
        self.done = 0
        lines, whole = ([], 0) if throw_away else self._read()
        if not lines:
            with writing(self._path):
                self._path.unlink(missing_ok=True)
            self._append({"version": _VERSION} | head)
            return 0
        for key, what in _HEAD.items():
            if lines[0].get(key) != head[key]:
                changed = what if key != "options" else f"{what} ({_difference(lines[0].get(key), head[key])})"
                remedy = "--no-resume discards it"
                if key == "streamed":
                    remedy = f"--stream-layers {'on' if lines[0].get(key) else 'off'} continues it, {remedy}"
                raise OutputError(f"{self._path.parent} has an unfinished calibration {changed}", remedy)
        with writing(self._path):
            os.truncate(self._path, whole)  # remove an incomplete last line
        self.done = max((line["done"] for line in lines[1:]), default=0)
        return self.done

    def head(self) -> dict[str, Any]:
        """Return the head of an unfinished calibration, empty if there is none. Reads only, without the lock."""
        lines, _ = self._read()
        return lines[0] if lines else {}

    def add(self, done: int) -> None:
        """Record the number of finished units."""
        self._append({"done": done})
        self.done = done

    def _read(self) -> tuple[list[dict[str, Any]], int]:
        """The lines before the first incomplete or malformed one, and their bytes."""
        if not self._path.exists():
            return [], 0
        text = read_regular(self._path)
        lines: list[dict[str, Any]] = []
        whole = 0
        for raw in text.splitlines(keepends=True):
            line = _parse(raw)
            if line is None or (lines and type(line.get("done")) is not int):
                break
            lines.append(line)
            whole += len(raw)
        return (lines, whole) if lines and lines[0].get("version") == _VERSION else ([], 0)

    def _append(self, line: dict[str, Any]) -> None:
        with writing(self._path):
            fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            with os.fdopen(fd, "wb") as file:
                file.write(json.dumps(line).encode() + b"\n")
                file.flush()
                os.fsync(fd)


def _parse(raw: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(raw) if raw.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) else None


def _difference(before: Any, now: Any) -> str:
    if not isinstance(before, dict):
        return "unreadable"
    return ", ".join(f"{key} {before.get(key)}, now {now[key]}" for key in now if before.get(key) != now[key])
