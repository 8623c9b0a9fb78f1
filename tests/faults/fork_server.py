"""Runs commands of fp8pack as forks of one process that has imported everything: a fault then costs no start of Python.

    python fork_server.py MODULE...    reads a JSON request on a line, writes the exit status on a line, and so on

A request has `words` (the command line), `folder` (where it runs), `stderr` (a file) and `settings` (environment).
"""

import ctypes
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TIMEOUT = 300


@dataclass(frozen=True)
class Ended:
    """How a command ended; the status of one that a signal ended is negative."""

    status: int
    stderr: str


class ForkServer:
    """One such process, and what it is asked."""

    def __init__(self, modules: Sequence[str], shim: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "LD_PRELOAD": str(shim), "OMP_NUM_THREADS": "1"},
            text=True,
        )

    def run(self, words: Sequence[str], folder: Path, settings: dict[str, str]) -> Ended:
        """Run a command in a directory and wait for its end."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with tempfile.NamedTemporaryFile("r", errors="replace") as stderr:
            request = {"words": list(words), "folder": str(folder), "stderr": stderr.name, "settings": settings}
            print(json.dumps(request), file=self._process.stdin, flush=True)
            status = int(self._process.stdout.readline())
            return Ended(status, stderr.read())

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def serve(modules: Sequence[str]) -> dict[str, object] | None:
    """Answer requests until there are no more; in a fork, return the request."""
    for module in modules:
        importlib.import_module(module)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            return json.loads(line)  # type: ignore[no-any-return]
        ended = os.pidfd_open(child)
        if not select.select([ended], [], [], TIMEOUT)[0]:
            os.kill(child, signal.SIGKILL)
        os.close(ended)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    return None


def become(request: dict[str, object]) -> None:
    """Turn a fork into the process of a command."""
    stderr = os.open(str(request["stderr"]), os.O_WRONLY)
    nothing = os.open(os.devnull, os.O_RDWR)
    for number, descriptor in enumerate((nothing, nothing, stderr)):
        os.dup2(descriptor, number)
    os.closerange(3, 64)
    os.chdir(str(request["folder"]))
    settings = request["settings"]
    assert isinstance(settings, dict)
    os.environ |= settings
    words = request["words"]
    assert isinstance(words, list)
    sys.argv = ["fp8pack", *words]
    ctypes.CDLL(None).read_faults()


if __name__ == "__main__":
    from fp8pack.__main__ import main

    if asked := serve(sys.argv[1:]):
        become(asked)
        main()
