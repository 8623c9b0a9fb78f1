"""What an unfinished calibration left behind, so that the same command goes on."""

import json
import os
from pathlib import Path
from typing import Any

from fp8pack.checkpoint.shard_writer import writing
from fp8pack.errors import OutputError

_VERSION = 1


class Journal:
    """The journal of a calibration: what it is, then a line for each unit of work that is finished and on the disk."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def resume(self, head: dict[str, Any], *, throw_away: bool) -> int:
        """Return how many units are finished, after making sure that they belong to this calibration; 0 starts anew.

        Raises:
            OutputError: they belong to another model, or were made with other prompts or options.
        """
        lines = [] if throw_away else self._lines()
        if not lines:
            with writing(self._path):
                self._path.unlink(missing_ok=True)
            self._append({"version": _VERSION} | head)
            return 0
        for key, what in (("fingerprint", "of another model"), ("prompts", "with other prompts"), ("options", "")):
            if lines[0].get(key) != head[key]:
                changed = what or f"with other options ({_difference(lines[0].get(key), head[key])})"
                raise OutputError(
                    f"{self._path.parent} holds an unfinished calibration {changed}: --no-resume throws it away"
                )
        return max((line["done"] for line in lines[1:]), default=0)

    def add(self, done: int) -> None:
        """Note that so many units are finished."""
        self._append({"done": done})

    def _lines(self) -> list[dict[str, Any]]:
        """The lines that are whole: a torn last one was never finished, and is cut off."""
        try:
            text = self._path.read_bytes()
        except FileNotFoundError:
            return []
        if not text.endswith(b"\n"):
            os.truncate(self._path, text.rfind(b"\n") + 1)
        lines: list[dict[str, Any]] = []
        for raw in text.split(b"\n")[:-1]:
            try:
                line = json.loads(raw)
            except ValueError:
                return lines
            if not isinstance(line, dict) or (lines and type(line.get("done")) is not int):
                return lines
            lines.append(line)
        return lines if lines and lines[0].get("version") == _VERSION else []

    def _append(self, line: dict[str, Any]) -> None:
        with writing(self._path):
            fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            try:
                os.write(fd, json.dumps(line).encode() + b"\n")
                os.fsync(fd)
            finally:
                os.close(fd)


def _difference(before: Any, now: Any) -> str:
    if not isinstance(before, dict):
        return "unreadable"
    return ", ".join(f"{key} {before.get(key)}, now {now[key]}" for key in now if before.get(key) != now[key])
