"""Make every call of every command fail in every way, and look at what it leaves.

    python tests/faults/run_faults.py            every point: two hours on two cores, most of them for calibrate
    python tests/faults/run_faults.py --every 7  each seventh

Nothing in the product takes part: shim.c stands between the process and the C library. After each fault there must be
no output, the one from before, or the whole new one; the error is a sentence; and the same command then ends in the
same root.
"""

import argparse
import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool
from pathlib import Path
from queue import Queue

import numpy as np
from calibration.tiny_models import make_model, save_model
from checkpoints import llama_config, llama_tensors
from faults.fork_server import Ended, ForkServer
from safetensors.numpy import save_file

import fp8pack
from fp8pack.errors import Fp8PackError

SHIM = Path(__file__).with_name("shim.c")
KINDS = {
    "open": ("kill", errno.EACCES, errno.EMFILE, errno.EIO),
    "read": ("kill", "short", errno.EIO, errno.EINTR, errno.ESTALE),
    "write": ("kill", "short", errno.ENOSPC, errno.EIO, errno.EINTR),
    "sync": ("kill", errno.EIO, errno.ENOSPC),
    "rename": ("kill", errno.EACCES, errno.EIO),
    "mkdir": ("kill", errno.EACCES, errno.ENOSPC),
    "unlink": ("kill", errno.EACCES, errno.EIO),
    "truncate": ("kill", errno.ENOSPC, errno.EIO),
}
HARMLESS = ("short", errno.EINTR)  # what a call may do any time: the command goes on
EXPECTED = range(1, 8)  # exit codes of failures that are a sentence


@dataclass(frozen=True)
class Command:
    """A command line in a directory, and the output that it makes there."""

    name: str
    words: tuple[str, ...]
    output: str
    before: str = ""  # the source that is there already under the output's name
    repairs: bool = False


ONE = ("--workers", "1")  # calls come in one order
PACK = ("pack", "model", "--scheme", "FP8_DYNAMIC", *ONE)
PACKING = ("fp8pack.packing.write", "fp8pack.packing.unpack", "fp8pack.reading.verify", "fp8pack.report.summary")
CALIBRATING = (
    "transformers.models.gemma2.modeling_gemma2",
    "fp8pack.calibration.calibrate",
    "transformers.models.auto.tokenization_auto",
)
CALIBRATE = ("calibrate", "gemma", "--prompts", "prompts.txt", "-o", "out.safetensors", "--device", "cpu")
COMMANDS = (
    Command("pack", (*PACK, "-o", "out"), "out"),
    Command("pack --overwrite", (*PACK, "-o", "out", "--overwrite"), "out", "other-fp8"),
    Command("pack, two passes", ("pack", "model", "--scheme", "FP8_SCALED", "-o", "out", *ONE), "out"),
    Command("pack, a single file", ("pack", "single.safetensors", "-o", "out.safetensors", *ONE), "out.safetensors"),
    Command("convert", ("convert", "fp8", "--quant-method", "fp8pack", "-o", "out", *ONE), "out"),
    Command("unpack", ("unpack", "fp8", "-o", "out", *ONE), "out"),
    Command("merge", ("merge", "a.safetensors", "b.safetensors", "-o", "out.safetensors"), "out.safetensors"),
    Command("verify --repair", ("verify", "out", "--against", "model", "--repair"), "out", "damaged", repairs=True),
    Command("calibrate", (*CALIBRATE, "--stream-layers", "off"), "out.safetensors"),
    Command("calibrate, streamed", (*CALIBRATE, "--stream-layers", "on"), "out.safetensors"),
)


@dataclass(frozen=True)
class Point:
    """The call of a command that fails, and how."""

    command: Command
    kind: str
    action: str | int
    at: int


@dataclass
class Bench:
    """Sources, the roots that commands end in, and the library that makes calls fail."""

    place: Path
    roots: dict[str, str] = field(default_factory=dict)
    servers: dict[str, Queue[ForkServer]] = field(default_factory=dict)

    def prepare(self, commands: Sequence[Command]) -> None:
        """Write the sources, compile the library, and run every command undisturbed."""
        shim = self.place / "shim.so"
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(shim), str(SHIM), "-ldl"], check=True)
        write_sources(self.place / "source")
        for command in commands:
            name = command.words[0]
            if name not in self.servers:
                self.servers[name] = Queue()
                for _ in range(os.cpu_count() or 1):
                    self.servers[name].put(ForkServer(CALIBRATING if name == "calibrate" else PACKING, shim))
            folder = self.fresh(command)
            ended = self.run(command, folder)
            assert ended.status == 0, ended.stderr
            self.roots[command.name] = root_of(folder / command.output)
            shutil.rmtree(folder)

    def close(self) -> None:
        """End the processes."""
        for queue in self.servers.values():
            while not queue.empty():
                queue.get().close()

    def fresh(self, command: Command) -> Path:
        """Return a directory with the sources, and the output that is there before, if one is."""
        folder = Path(tempfile.mkdtemp(dir=self.place))
        source = self.place / "source"
        for path in source.iterdir():
            if path.name in command.words or not path.is_dir():
                copy = shutil.copytree if path.is_dir() else shutil.copy2
                copy(path, folder / path.name)
        if command.before:
            shutil.copytree(source / command.before, folder / command.output)
        return folder

    def run(self, command: Command, folder: Path, **fault: object) -> Ended:
        """Run a command, with a fault if one is given."""
        settings = {f"FAULT_{name.upper()}": str(value) for name, value in fault.items()}
        servers = self.servers[command.words[0]]
        server = servers.get()
        try:
            return server.run(command.words, folder, settings | ({"FAULT_DIR": str(folder)} if fault else {}))
        finally:
            servers.put(server)

    def count(self, command: Command) -> Counter[str]:
        """Return how many calls of each kind an undisturbed run makes."""
        folder = self.fresh(command)
        log = folder.with_suffix(".log")
        self.run(command, folder, calls=",".join(KINDS), at=0, log=log)
        shutil.rmtree(folder)
        calls = [Call(*line.split(" ", 2)[1:]) for line in log.read_text().splitlines()]
        lost = lost_without_power(calls, folder / f".{command.output}.fp8pack-partial")
        assert not lost, (command.name, lost)
        return Counter(call.kind for call in calls)

    def check(self, point: Point) -> str:
        """Make a call fail; return what is wrong with what is left, empty if nothing is, or `-` if it was not made."""
        folder = self.fresh(point.command)
        log, output = folder.with_suffix(".log"), folder / point.command.output
        before = root_of(output)
        fault = {"calls": point.kind, "at": point.at, "action": point.action, "log": log}
        ended = self.run(point.command, folder, **fault)
        try:
            if not log.exists():
                return "-"
            if problem := self._problem(point, ended, output, before):
                return problem
            again = self.run(point.command, folder)
            if again.status:
                return f"the same command then ends with {again.status}: {last_line(again.stderr)}"
            if root_of(output) != self.roots[point.command.name]:
                return "the same command then ends in another root"
            left = {path.name for path in folder.iterdir() if path.name.startswith(".")}
            return f"{left} are left" if left else ""
        finally:
            shutil.rmtree(folder)

    def _problem(self, point: Point, ended: Ended, output: Path, before: str) -> str:
        if "Traceback" in ended.stderr:
            return f"a traceback: {last_line(ended.stderr)}"
        if point.action in HARMLESS and ended.status:
            return f"it ends with {ended.status}: {last_line(ended.stderr)}"
        if point.action != "kill" and ended.status not in (0, *EXPECTED):
            return f"it ends with {ended.status}"
        right, found = self.roots[point.command.name], root_of(output)
        if found == right or (ended.status and found == before):
            return ""
        if point.command.repairs and ended.status:
            before_it = self.place / "source" / point.command.before
            others = [path for path in output.iterdir() if path.name not in DAMAGED]
            changed = [path.name for path in others if not same_bytes(path, before_it / path.name)]
            return f"{changed} were whole and are written" if changed else ""
        return f"the output has the root {found or 'of nothing'}"


DAMAGED = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "config.json", "tokenizer.json")


def write_sources(folder: Path) -> None:
    """Write what the commands read."""
    write_model(folder / "model", 2)
    write_model(folder / "other", 1)
    save_file(llama_tensors(1), folder / "single.safetensors")
    fp8pack.pack(folder / "model", folder / "fp8", scheme="FP8_BLOCK")
    fp8pack.pack(folder / "other", folder / "other-fp8")
    fp8pack.pack(folder / "model", folder / "damaged", scheme="FP8_DYNAMIC")
    for name, place in zip(DAMAGED, (9, -9, 9, 1), strict=True):  # a header, a payload, two small files
        data = bytearray((folder / "damaged" / name).read_bytes())
        data[place] ^= 1
        (folder / "damaged" / name).write_bytes(data)
    write_calibrations(folder)
    save_model(make_model("gemma2"), folder / "gemma")
    (folder / "prompts.txt").write_text("one prompt\nanother\nand a third\n")


def same_bytes(one: Path, other: Path) -> bool:
    """Whether two files are there with the same bytes; a directory is like any other."""
    return one.exists() and (one.is_dir() or (other.exists() and one.read_bytes() == other.read_bytes()))


@dataclass(frozen=True)
class Call:
    """A call that was made: its kind, and the path."""

    kind: str
    path: str


def lost_without_power(calls: Sequence[Call], staging: Path) -> list[str]:
    """Return what a loss of power could take from a run that has ended.

    Whatever is renamed must have been synced since it was written, and the directory that it is renamed into after it;
    the staging directory is renamed to be removed.
    """
    lost, unsynced, directory = [], set[str](), ""
    for call in calls:
        match call.kind:
            case "write" | "truncate":
                unsynced.add(call.path)
            case "sync":
                unsynced.discard(call.path)
                directory = "" if call.path == directory else directory
            case "rename" if Path(call.path) != staging:
                lost += [path for path in unsynced if path == call.path or path.startswith(f"{call.path}/")]
                directory = str(staging.parent if staging in Path(call.path).parents else Path(call.path).parent)
            case "unlink":
                unsynced.discard(call.path)
    return [*lost, *([f"the name in {directory}"] if directory else [])]


def write_model(folder: Path, layers: int) -> None:
    """Write a small model with an index and side files."""
    folder.mkdir(parents=True)
    tensors = llama_tensors(layers)
    half = len(tensors) // 2
    files = [f"model-{i + 1:05}-of-00002.safetensors" for i in range(2)]
    parts = [dict(list(tensors.items())[:half]), dict(list(tensors.items())[half:])]
    for file, part in zip(files, parts, strict=True):
        save_file(part, folder / file, {"format": "pt"})
    weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(llama_config(layers=layers), indent=2))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "assets").mkdir()
    (folder / "assets" / "chat.txt").write_text("hello")


def write_calibrations(folder: Path) -> None:
    """Write two calibrations of one model, over other prompts."""
    import torch

    model = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False)).to(torch.bfloat16)
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        with torch.no_grad(), fp8pack.observe(model) as observation:
            model(torch.randn(8, 64, dtype=torch.bfloat16))
        observation.save(folder / f"{name}.safetensors")


def root_of(output: Path) -> str:
    """Return the root of an output that is whole, byte for byte; the bytes of a calibration; else what is wrong."""
    manifest = output / "fp8pack.json" if output.is_dir() else output.with_suffix(".fp8pack.json")
    if not output.exists():
        return ""
    if not manifest.exists():
        return f"bytes {hash(output.read_bytes())}" if output.is_file() else "no manifest"
    try:
        found = fp8pack.verify(output)
    except Fp8PackError as error:
        return str(error)
    return str(found.root) if found.ok and not found.other_files else f"differs: {found.differences[:1]}"


def last_line(text: str) -> str:
    """Return the end of what was printed."""
    return text.strip().splitlines()[-1][:200] if text.strip() else ""


def points(bench: Bench, commands: Sequence[Command], every: int) -> Iterator[Point]:
    """Yield each point, or each n-th of all."""
    index = 0
    for command in commands:
        counts = bench.count(command)
        for kind, actions in KINDS.items():
            for at in range(1, counts[kind] + 1):
                for action in actions:
                    if index % every == 0:
                        yield Point(command, kind, action, at)
                    index += 1


def table(found: dict[Point, str]) -> str:
    """Return the counts of each command as a table."""
    lines = [f"{'command':24} {'points':>7} {'right':>7} {'wrong':>7}"]
    for name in dict.fromkeys(point.command.name for point in found):
        answers = [answer for point, answer in found.items() if point.command.name == name and answer != "-"]
        counts = Counter(bool(answer) for answer in answers)
        lines.append(f"{name:24} {len(answers):7} {counts[False]:7} {counts[True]:7}")
    answers = [answer for answer in found.values() if answer != "-"]
    lines.append(f"{'all':24} {len(answers):7} {answers.count(''):7} {sum(map(bool, answers)):7}")
    return "\n".join(lines)


def check_all(every: int, commands: Sequence[Command] = COMMANDS) -> dict[Point, str]:
    """Check the points of some commands; return what is wrong with each, empty if nothing is."""
    with tempfile.TemporaryDirectory() as place:
        bench = Bench(Path(place))
        try:
            bench.prepare(commands)
            chosen = list(points(bench, commands, every))
            with ThreadPool(os.cpu_count()) as pool:
                return dict(zip(chosen, pool.map(bench.check, chosen, chunksize=1), strict=True))
        finally:
            bench.close()


def main() -> int:
    """Print the table and every point that went wrong; the exit status says whether one did."""
    parser = argparse.ArgumentParser(description="Make every call of every command fail, and look at what is left.")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="take each N-th point")
    parser.add_argument("--only", action="append", metavar="COMMAND", help="one command; repeat for more")
    asked = parser.parse_args()
    commands = [command for command in COMMANDS if not asked.only or command.name in asked.only]
    found = check_all(asked.every, commands)
    for point, answer in found.items():
        if answer not in ("", "-"):
            print(f"{point.command.name}: {point.kind} {point.at} {point.action}: {answer}")
    print(table(found))
    return int(any(answer not in ("", "-") for answer in found.values()))


if __name__ == "__main__":
    np.random.seed(0)
    sys.exit(main())
