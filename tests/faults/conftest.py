"""A checkpoint of 64 MB whose pack can be stopped anywhere, and the bytes that every stopped pack must end in."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fp8pack.packing.pack import pack

PATIENCE_SECONDS = 60.0
SHARDS = 4
# Small bands, each journalled at once, and a sync that takes a while and leaves the disk alone: the pack has a middle
# that can be hit, on any disk.
SLOW = """
import os, sys, time
from fp8pack.packing import options
from fp8pack.planning.sizes import Sizes
options.SIZES = Sizes(band=512 << 10, checkpoint=1)
os.fdatasync = lambda fd: time.sleep(0.003)
"""
RUN = """
from fp8pack.cli.app import main
main()
"""
# Dies before the n-th call that changes the file system, as `strace -e inject=...:signal=SIGKILL:when=n` would have it;
# without n, says at its end how many there were.
DIE_AT = """
import atexit, itertools, os, signal, sys
_counter, _last = itertools.count(1), {n}
def _counted(name, call):
    def counted(*arguments, **options):
        if (name != "open" or arguments[1] & os.O_CREAT) and next(_counter) == _last:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **options)
    return counted
for _name in {calls}:
    setattr(os, _name, _counted(_name, getattr(os, _name)))
if _last == 0:
    atexit.register(lambda: print(next(_counter) - 1, file=sys.stderr))
"""
CALLS = ("open", "pwrite", "write", "ftruncate", "fdatasync", "fsync", "mkdir", "rename", "replace", "unlink", "rmdir")


def dying_at(n: int) -> str:
    """Return the code that kills a pack before its n-th change of the file system; 0 counts them."""
    return DIE_AT.format(n=n, calls=CALLS)


def files_of(folder: Path) -> dict[str, bytes]:
    """Return every file of a directory with its bytes."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _write_shard(path: Path, tensors: dict[str, NDArray[np.uint16]]) -> None:
    entries, position = {}, 0
    for name, bits in tensors.items():
        offsets = [position, position + bits.nbytes]
        entries[name] = {"dtype": "BF16", "shape": list(bits.shape), "data_offsets": offsets}
        position += bits.nbytes
    raw = json.dumps(entries).encode()
    data = b"".join(bits.tobytes() for bits in tensors.values())
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


def write_model(folder: Path, *, shards: int, layers: int, size: int, seed: int = 0) -> Path:
    """Write a checkpoint whose layers have two square linears and a norm; return its directory."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    weight_map = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        tensors = {}
        for layer in range(shard * layers, (shard + 1) * layers):
            values = random.standard_normal((2 * size + 1, size), dtype=np.float32)
            bits = (values.view(np.uint32) >> 16).astype(np.uint16)
            prefix = f"model.layers.{layer}"
            tensors[f"{prefix}.self_attn.o_proj.weight"] = bits[:size]
            tensors[f"{prefix}.mlp.down_proj.weight"] = bits[size : 2 * size]
            tensors[f"{prefix}.input_layernorm.weight"] = bits[2 * size]
        _write_shard(folder / name, tensors)
        weight_map |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text('{\n  "architectures": ["LlamaForCausalLM"]\n}\n')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "assets").mkdir()
    (folder / "assets" / "vocab.txt").write_text("words\n" * 1000)
    return folder


@dataclass
class Ran:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def facts(self) -> dict[str, Any]:
        """What `--json` printed."""
        return dict(json.loads(self.stdout))


class Running:
    """A command that runs in a process of its own."""

    def __init__(self, process: subprocess.Popen[str], journal: Path) -> None:
        self.process = process
        self._journal = journal

    def reach(self, lines: int) -> bool:
        """Return once the journal has this many lines, or False once the process ended before."""
        give_up = time.monotonic() + PATIENCE_SECONDS
        while self._lines() < lines:
            if self.process.poll() is not None:
                return False
            assert time.monotonic() < give_up, "the journal does not grow"
            time.sleep(0.001)
        return True

    def end(self) -> Ran:
        """Wait for the end."""
        stdout, stderr = self.process.communicate(timeout=PATIENCE_SECONDS)
        return Ran(self.process.returncode, stdout, stderr)

    def kill(self) -> Ran:
        """Kill at once, as `kill -9` does, and wait for the end."""
        self.process.kill()
        return self.end()

    def _lines(self) -> int:
        try:
            return self._journal.read_bytes().count(b"\n")
        except FileNotFoundError:
            return 0


class Bench:
    """A source, the place where its pack goes, and the bytes it must end in."""

    def __init__(self, model: Path, output: Path, reference: dict[str, bytes], prelude: str) -> None:
        self.model, self.output, self.reference, self.prelude = model, output, reference, prelude
        self.staging = output.parent / f".{output.name}.fp8pack-partial"
        self.old = output.parent / f".{output.name}.fp8pack-old"
        self.journal = self.staging / "journal.jsonl"

    def start(self, *flags: str, model: Path | None = None, extra: str = "", **options: Any) -> Running:
        """Start `fp8pack pack --json` with these flags; `extra` is Python that runs before it."""
        code = self.prelude + extra + RUN
        target = [str(model or self.model), "-o", str(self.output)]
        command = [sys.executable, "-c", code, "pack", *target, "--json", "--workers", "2", *flags]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
        process: subprocess.Popen[str] = subprocess.Popen(command, **options)
        return Running(process, self.journal)

    def run(self, *flags: str, model: Path | None = None, extra: str = "", **options: Any) -> Ran:
        """Run `fp8pack pack --json` to its end."""
        return self.start(*flags, model=model, extra=extra, **options).end()

    def count_changes(self, *flags: str, **options: Any) -> int:
        """Run to the end; return how many calls changed the file system."""
        ran = self.run(*flags, extra=dying_at(0), **options)
        assert ran.code == 0, ran.stderr
        return int(ran.stderr.splitlines()[-1])

    def finish_here(self, **options: Any) -> None:
        """Do in this process what `run` does in another, and check what it leaves; for packs without a prelude."""
        assert not self.prelude
        facts = pack(self.model, self.output, workers=2, **options)
        assert facts.root == json.loads(self.reference["fp8pack.json"])["root"]
        self.check_output()
        self.check_tidy()

    def leave_unfinished(self, *flags: str, lines: int = 12, model: Path | None = None) -> None:
        """Kill a pack once its journal has this many lines."""
        running = self.start(*flags, model=model)
        assert running.reach(lines)
        running.kill()
        assert self.journal.exists()
        assert not self.output.exists()

    def check_complete(self, ran: Ran) -> None:
        """A command ended well: root and bytes are those of an undisturbed run, and nothing else lies there."""
        assert ran.code == 0, ran.stderr
        assert ran.facts["root"] == json.loads(self.reference["fp8pack.json"])["root"]
        self.check_output()
        self.check_tidy()

    def check_output(self) -> None:
        """Every file of the output has the bytes that an undisturbed run gives it."""
        found = files_of(self.output)
        assert found.keys() == self.reference.keys()
        assert [name for name, data in found.items() if data != self.reference[name]] == []

    def check_tidy(self) -> None:
        """Nothing of fp8pack's own lies beside the output."""
        assert [path.name for path in self.output.parent.iterdir() if "fp8pack-" in path.name] == []

    def check_message(self, ran: Ran, *words: str) -> None:
        """A command ended with one line that holds these words and no data."""
        lines = [line for line in ran.stderr.splitlines() if line.startswith("fp8pack: ")]
        assert "Traceback" not in ran.stderr
        assert len(lines) == 1
        assert ran.stderr.splitlines()[-1] == lines[0]
        assert ran.stdout == ""
        for word in words:
            assert word in lines[0]


def _measure(folder: Path, prelude: str, **shape: int) -> tuple[Path, dict[str, bytes]]:
    bench = Bench(write_model(folder / "model", **shape), folder / "reference", {}, prelude)
    ran = bench.run()
    assert ran.code == 0, ran.stderr
    reference = files_of(bench.output)
    shutil.rmtree(bench.output)
    return bench.model, reference


@pytest.fixture(scope="session")
def _large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    return _measure(tmp_path_factory.mktemp("large"), SLOW, shards=SHARDS, layers=4, size=1024)


@pytest.fixture(scope="session")
def _small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    return _measure(tmp_path_factory.mktemp("small"), "", shards=2, layers=1, size=128)


@dataclass
class Replacing:
    """An output that another one replaces: how it looks before, and how many calls replacing it takes."""

    before: Path
    root: str
    num_changes: int


@pytest.fixture(scope="session")
def num_changes(tmp_path_factory: pytest.TempPathFactory, _small: tuple[Path, dict[str, bytes]]) -> int:
    """Return how many calls of a small pack change the file system."""
    return Bench(_small[0], tmp_path_factory.mktemp("count") / "out", _small[1], "").count_changes()


@pytest.fixture(scope="session")
def replacing(tmp_path_factory: pytest.TempPathFactory, _small: tuple[Path, dict[str, bytes]]) -> Replacing:
    """Return the pack of another model, which a small pack is to replace."""
    folder = tmp_path_factory.mktemp("replacing")
    other = write_model(folder / "other", shards=2, layers=1, size=128, seed=7)
    bench = Bench(_small[0], folder / "out", _small[1], "")
    root = bench.run(model=other).facts["root"]
    shutil.copytree(bench.output, folder / "before")
    return Replacing(folder / "before", root, bench.count_changes("--overwrite"))


@pytest.fixture
def bench(tmp_path: Path, _large: tuple[Path, dict[str, bytes]]) -> Bench:
    """Return a bench of 64 MB whose pack takes long enough to be stopped in the middle."""
    return Bench(_large[0], tmp_path / "out", _large[1], SLOW)


@pytest.fixture
def small_bench(tmp_path: Path, _small: tuple[Path, dict[str, bytes]]) -> Bench:
    """Return a bench of 200 kB that is packed as always."""
    return Bench(_small[0], tmp_path / "out", _small[1], "")


@pytest.fixture
def write_other_model() -> Callable[..., Path]:
    """Return the function that writes checkpoints."""
    return write_model


@pytest.fixture
def die_at() -> Callable[[int], str]:
    """Return the function whose code kills a pack before its n-th change of the file system."""
    return dying_at
