"""A place where calibrations run in processes of their own, and are killed, stopped and continued."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import verbs
from checkpoints import DEMO

from fp8pack.calibration.options import CalibrateOptions
from fp8pack.planning.calibration_summary import CalibrationSummary

PATIENCE_SECONDS = 60.0
PROMPTS = 12


# Imports once what takes seconds, then forks for each command: a line of JSON in, a line out.
SERVER = """
import atexit, json, os, sys, traceback
import torch, transformers
import fp8pack.calibration.calibrate
from fp8pack.cli.app import main
torch.set_num_threads(1)
transformers.Qwen3ForCausalLM, transformers.PreTrainedTokenizerFast
while line := sys.stdin.readline():
    job = json.loads(line)
    if "wait" in job:
        pid, status = os.waitpid(job["wait"], 0 if job["block"] else os.WNOHANG)
        print(os.waitstatus_to_exitcode(status) if pid else "running", flush=True)
        continue
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for fd, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), fd)
        sys.argv = ["fp8pack", *job["arguments"]]
        code = 1
        try:
            exec(job["prelude"])
            main()
        except SystemExit as ended:
            code = ended.code
        except BaseException:
            traceback.print_exc()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # the interpreter would take longer to end than the calibration took
    print(pid, flush=True)
"""


# Saves after every prompt, in a time that can be hit, and leaves the disk alone.
SLOW = """
import os, time
from fp8pack.calibration import resident
resident._SAVE_SHARE = 0
os.fdatasync = os.fsync = lambda fd: time.sleep(0.002)
"""


# Dies before the n-th call that changes the file system (the data itself aside); 0 says at its end how many there were.
DIE_AT = """
import atexit, itertools, os, signal, sys
_counter, _last = itertools.count(1), {n}
def _counted(name, call):
    def counted(*arguments, **options):
        if (name != "open" or arguments[1] & os.O_CREAT) and next(_counter) == _last:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **options)
    return counted
for _name in ("open", "write", "ftruncate", "fdatasync", "fsync", "mkdir", "rename", "replace", "unlink", "rmdir"):
    setattr(os, _name, _counted(_name, getattr(os, _name)))
if _last == 0:
    atexit.register(lambda: print(next(_counter) - 1, file=sys.stderr))
"""


# Lets the deadline come with the n-th batch.
STOP_AT = """
import itertools
from fp8pack.calibration.progress import Progress
_counter, _tick = itertools.count(1), Progress.tick
Progress.tick = lambda self, tokens: _tick(self, tokens) or next(_counter) >= {n}
"""


@dataclass
class Ran:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str


class Server:
    """A process that has imported everything and forks for each command."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def ask(self, **job: Any) -> str:
        """Send a job, return the answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()


class Running:
    """A command that runs in a process of its own."""

    def __init__(self, server: Server, staging: Path, arguments: list[str], prelude: str) -> None:
        self._server, self._journal = server, staging / "journal.jsonl"
        self._out, self._err = server.folder / "stdout", server.folder / "stderr"
        files = {"stdout": str(self._out), "stderr": str(self._err)}
        self.pid = int(server.ask(arguments=arguments, prelude=prelude, **files))

    def reach(self, lines: int) -> None:
        """Return once the journal has this many lines."""
        give_up = time.monotonic() + PATIENCE_SECONDS
        while not (self._journal.exists() and self._journal.read_bytes().count(b"\n") >= lines):
            assert self._server.ask(wait=self.pid, block=False) == "running", self._err.read_text()
            assert time.monotonic() < give_up, "the journal does not grow"
            time.sleep(0.001)

    def end(self) -> Ran:
        """Wait for the end."""
        code = int(self._server.ask(wait=self.pid, block=True))
        return Ran(code, self._out.read_text(), self._err.read_text())

    def kill(self, signum: int = signal.SIGKILL) -> Ran:
        """Send a signal and wait for the end."""
        os.kill(self.pid, signum)
        return self.end()


@dataclass
class Bench:
    """A place where calibrations go, and the bytes that they must end in."""

    server: Server
    folder: Path
    prompts: Path
    reference: bytes

    @property
    def output(self) -> Path:
        return self.folder / "out.safetensors"

    @property
    def staging(self) -> Path:
        return self.folder / ".out.safetensors.fp8pack-partial"

    def start(self, mode: str, *flags: str, prelude: str = SLOW) -> Running:
        """Start `fp8pack calibrate`."""
        arguments = ["calibrate", str(DEMO), "-o", str(self.output), "--prompts", str(self.prompts)]
        arguments += ["--num-prompts", str(PROMPTS), "--max-length", "32", "--stream-layers", mode, *flags]
        return Running(self.server, self.staging, arguments, prelude)

    def run(self, mode: str, *flags: str, prelude: str = SLOW) -> Ran:
        """Run `fp8pack calibrate` to its end."""
        return self.start(mode, *flags, prelude=prelude).end()

    def options(self, mode: str = "off", **changes: Any) -> CalibrateOptions:
        options = CalibrateOptions(
            output=self.output, prompts=str(self.prompts), num_prompts=PROMPTS, max_length=32, stream_layers=mode
        )
        return replace(options, **changes)

    def finish_here(self, mode: str = "off", **changes: Any) -> CalibrationSummary:
        """Do in this process what `run` does in another, and check what it leaves."""
        facts = verbs.calibrate(DEMO, self.options(mode, **changes))
        self.check_output()
        return facts

    def check_complete(self, ran: Ran) -> None:
        """A command ended well, in the bytes of an undisturbed run."""
        assert ran.code == 0, ran.stderr
        assert ran.stdout == f"{self.output}\n"
        self.check_output()

    def check_output(self) -> None:
        """The output has its bytes, and nothing lies beside it."""
        assert self.output.read_bytes() == self.reference
        assert [path.name for path in self.folder.iterdir()] == [self.output.name]

    def check_message(self, ran: Ran, *words: str) -> None:
        """A command ended with one line that holds these words, and no data."""
        lines = [line for line in ran.stderr.splitlines() if line.startswith("fp8pack: ")]
        assert "Traceback" not in ran.stderr, ran.stderr
        assert len(lines) == 1
        assert ran.stderr.splitlines()[-1] == lines[0]
        assert ran.stdout == ""
        for word in words:
            assert word in lines[0]
