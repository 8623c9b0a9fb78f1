"""Run commands, and say what each cost in time and memory."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

READ_NBYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Cost:
    """What one run of a command cost, with everything that it started and waited for."""

    wall: float
    user: float
    system: float
    peak_nbytes: int


@dataclass(frozen=True, slots=True)
class Command:
    """A command, the directory that it runs in, and the output under it that is removed before each run.

    With `source`, the command is one that ends on the disk: that directory is read into the page cache and everything
    dirty is written out before the clock starts.
    """

    line: str
    folder: Path
    output: str
    source: Path | None = None

    @property
    def argv(self) -> list[str]:
        """The command for the operating system: a shell only where the line needs one."""
        return ["sh", "-c", self.line] if "&&" in self.line else self.line.split()


class CommandError(RuntimeError):
    """A command failed; the message holds the end of what it printed."""


def run(command: Command, extra: Mapping[str, str] | None = None) -> Cost:
    """Run a command once and return its cost; CommandError when it fails."""
    remove_output(command)
    if command.source is not None:
        os.sync()
        read_all(command.source)
    log_path = command.folder / "log.txt"
    with log_path.open("wb") as log:
        begin = time.perf_counter()
        process = subprocess.Popen(
            command.argv,
            cwd=command.folder,
            env={**environment(), **(extra or {})},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.terminate()
            raise
        wall = time.perf_counter() - begin
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise CommandError(f"`{command.line}` ended with {process.returncode}: {last_line(log_path.read_text())}")
    return Cost(wall, usage.ru_utime, usage.ru_stime, usage.ru_maxrss * 1024)


def remove_output(command: Command) -> None:
    """Remove what an earlier run of a command wrote, finished or not."""
    for name in (command.output, f".{command.output}.fp8pack-partial"):
        shutil.rmtree(command.folder / name, ignore_errors=True)


def alternate(commands: Sequence[Command], rounds: int, discarded: int = 1) -> list[list[Cost]]:
    """Run the commands in turn, `rounds` times after some rounds that do not count; return the costs of each."""
    costs: list[list[Cost]] = [[] for _ in commands]
    for number in range(discarded + rounds):
        for command, found in zip(commands, costs, strict=True):
            cost = run(command)
            print(f"  {cost.wall:7.2f} s  {command.line}", file=sys.stderr)
            if number >= discarded:
                found.append(cost)
    return costs


def environment() -> dict[str, str]:
    """Return the environment of every command: this Python's programs come first, and byte code is cached.

    The cache of byte code stands for what installing a package compiles; it lies in a directory of its own, so that
    nothing is written beside the sources.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return kept | {"PATH": path}


def last_line(text: str) -> str:
    """Return the last line of what a failed command printed, which says why."""
    return (text.strip().splitlines() or ["it printed nothing"])[-1][:300]


def wall(costs: Sequence[Cost]) -> float:
    """Return the median of the wall seconds."""
    return median(cost.wall for cost in costs)


def read_all(folder: Path) -> None:
    """Read every file of a directory, which leaves it in the page cache."""
    buffer = bytearray(READ_NBYTES)
    for path in folder.iterdir():
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def forget_all(folder: Path) -> None:
    """Let go of the page cache of every file below a directory: a full cache doubles what a page of tmpfs costs."""
    for path in (path for path in folder.rglob("*.safetensors") if path.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def nbytes_of(folder: Path) -> int:
    """Return the bytes of all files of a directory."""
    return sum(path.stat().st_size for path in folder.iterdir())
