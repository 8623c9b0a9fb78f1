"""What an unfinished calibration left behind, so that the same command goes on."""

import json
import os
from pathlib import Path
from typing import Any

from fp8pack.checkpoint.shard_writer import writing
from fp8pack.errors import OutputError

_VERSION = 1
_HEAD = {
    "fingerprint": "of another model",
    "prompts": "with other prompts",
    "options": "with other options",
    "streamed": "whose --stream-layers was another: the opposite continues it",
}


class CalibrationJournal:
    """The journal of a calibration: what it is, then a line for each unit of work that is finished and on the disk."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.done = 0

    def resume(self, head: dict[str, Any], *, throw_away: bool) -> int:
        """Return how many units are finished, after making sure that they belong to this calibration; 0 starts anew.

        Raises:
            OutputError: they belong to another model, or were made with other prompts or options.
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
                raise OutputError(
                    f"{self._path.parent} holds an unfinished calibration {changed}: --no-resume throws it away"
                )
        with writing(self._path):
            os.truncate(self._path, whole)  # so that more can follow a torn line
        self.done = max((line["done"] for line in lines[1:]), default=0)
        return self.done

    def head(self) -> dict[str, Any]:
        """Return what an unfinished calibration is, empty if there is none. It changes nothing: no lock is held."""
        lines, _ = self._read()
        return lines[0] if lines else {}

    def add(self, done: int) -> None:
        """Note that so many units are finished."""
        self._append({"done": done})
        self.done = done

    def _read(self) -> tuple[list[dict[str, Any]], int]:
        """The lines up to the first that is torn or malformed, and their bytes."""
        try:
            text = self._path.read_bytes()
        except FileNotFoundError:
            return [], 0
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
            fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            try:
                os.write(fd, json.dumps(line).encode() + b"\n")
                os.fsync(fd)
            finally:
                os.close(fd)


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
