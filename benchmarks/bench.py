"""Measure fp8pack against its bounds on this machine, and write the results as Markdown.

    python benchmarks/bench.py --out docs/benchmarks/FILE.md
    python benchmarks/bench.py --only kernels --only oracle

Everything it makes lies in a directory `fp8pack-bench` under --work and --disk, and is removed at the end.
benchmarks/README.md says what each row means. Linux only.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from machine import free_nbytes
from measure import (
    Command,
    CommandError,
    Cost,
    alternate,
    environment,
    forget_all,
    last_line,
    nbytes_of,
    remove_output,
    run,
    wall,
)
from result import Row, markdown

from fp8pack.inputs import parse_size
from fp8pack.units import format_size

HERE = Path(__file__).resolve().parent
NAME = "fp8pack-bench"
PACKED, COPY = "packed", "copy"  # like models, relative to the directory that the commands run in
TINY = ("models/tiny", "--small-tensors 64 --shards 1")
SMALLER = "2GiB"  # of two models, whose difference in size and time makes a rate
PEER = "peers/llm-compressor"
PEER_TORCH = "2.13.0"
MAX_PEAK_NBYTES = 300 << 20


@dataclass(slots=True)
class Bench:
    """Where and how often to measure; `commands` collects, for each row, what was run."""

    tmpfs: Path
    disk: Path
    rounds: int
    peer_rounds: int
    size: str
    model: Path | None
    keep_model: bool
    commands: dict[str, list[str]] = field(default_factory=dict)

    def make_model(self, folder: Path, name: str, arguments: str) -> str:
        """Make a model under a directory unless it is there already; return its name."""
        path = folder / name
        if not path.exists():
            partial = path.with_name(f"{path.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            call([sys.executable, str(HERE / "make_model.py"), str(partial), *arguments.split()])
            partial.rename(path)
        line = f"python benchmarks/make_model.py {name} {arguments}"
        if line not in self.commands.setdefault("models", []):
            self.commands["models"].append(line)
        return name

    def make_llama(self, folder: Path, size: str) -> str:
        """Make a model of about this size in 4 shards unless it is there already; return its name."""
        if folder == self.tmpfs and self.model is not None:
            return os.path.relpath(self.model, folder)
        return self.make_model(folder, f"models/llama-{size}", f"--size {size} --shards 4")

    def measure(self, row: str, commands: Sequence[Command], rounds: int, discarded: int = 1) -> list[list[Cost]]:
        """Run the commands of a row in turn, and remove what they wrote."""
        self.commands.setdefault(row, []).extend(command.line for command in commands)
        try:
            return alternate(commands, rounds, discarded)
        finally:
            for command in commands:
                remove_output(command)

    def drop(self, model: Path) -> None:
        """Remove a model that no later row needs, unless models are to be kept."""
        if not self.keep_model:
            shutil.rmtree(model, ignore_errors=True)


def call(argv: Sequence[str], **options: Any) -> str:
    """Run a helper that is not measured; return what it printed, or raise CommandError with its last line of stderr."""
    done = subprocess.run(argv, capture_output=True, text=True, env=environment(), check=False, **options)
    if done.returncode:
        line = " ".join(Path(argument).name for argument in argv)
        raise CommandError(f"`{line}` ended with {done.returncode}: {last_line(done.stderr)}")
    return str(done.stdout)


def bench_tmpfs(bench: Bench) -> list[Row]:
    """Row 1: the whole process against `cp -r`, source and output on tmpfs."""
    return [
        _against_copy(bench, bench.tmpfs, f"1. pack / `cp -r`, tmpfs, {scheme}", f"--scheme {scheme}", bound=0.60)
        for scheme in ("FP8_BLOCK", "FP8_DYNAMIC")
    ]


def bench_two_pass(bench: Bench) -> list[Row]:
    """Row 3: tensor-wide scales, which need two passes over the source, on tmpfs."""
    flags = "--granularity tensor --quant-method fp8pack"
    row = _against_copy(bench, bench.tmpfs, "3. pack / `cp -r`, tmpfs, tensor scales in two passes", flags, bound=1.0)
    bench.drop(bench.tmpfs / "models")  # tmpfs is memory, and the rows on the disk want a page cache
    return [row]


def bench_disk(bench: Bench) -> list[Row]:
    """Row 2: the same on a disk; both commands end in `sync`, and the source is in the page cache."""
    return [
        _against_copy(bench, bench.disk, f"2. pack / `cp -r`, disk, synced, {scheme}", f"--scheme {scheme}", bound=0.65)
        for scheme in ("FP8_BLOCK", "FP8_DYNAMIC")
    ]


def bench_convert(bench: Bench) -> list[Row]:
    """Rows 10 and 11: FP8 in, floats or FP8 out, against a copy of what is written, on tmpfs; and their memory."""
    folder, (source, fp8) = bench.tmpfs, _make_fp8(bench)
    cases = {
        "10. unpack / `cp -r` of what it writes": (f"fp8pack unpack {fp8} -o {PACKED}", source),
        "11. convert, bytes carried / `cp -r`": (
            f"fp8pack convert {fp8} -o {PACKED} --quant-method compressed-tensors",
            fp8,
        ),
        "11. convert, quantized anew / `cp -r`": (f"fp8pack convert {fp8} -o {PACKED} --scheme FP8_DYNAMIC", fp8),
    }
    rows = []
    for name, (convert, copied) in cases.items():
        commands = (Command(convert, folder, PACKED), Command(f"cp -r {copied} {COPY}", folder, COPY))
        converts, copies = bench.measure(name, commands, bench.rounds)
        rows.append(_ratio(name, {"fp8pack": converts, "cp": copies}, bound=1.5 if "anew" in name else 1.0))
        peaks = [cost.peak_nbytes / 2**20 for cost in converts]
        memory, passed = f"{name.split(' /')[0]}: peak memory, MiB", max(peaks) * 2**20 <= MAX_PEAK_NBYTES
        rows.append(Row(memory, "≤ 300", f"{median(peaks):.0f}", _range(peaks, "{:.0f}"), passed))
    return rows


def bench_verify(bench: Bench) -> list[Row]:
    """Row 12: the whole process `fp8pack verify` against programs that digest the same files, on tmpfs."""
    folder, (source, fp8) = bench.tmpfs, _make_fp8(bench)
    bench.drop(folder / source)
    others = {"sha256sum": ("sha256sum", 0.5), "b3sum": ("b3sum --num-threads 2", 1.43)}
    rows = []
    for program, (other, bound) in others.items():
        name = f"12. verify / `{other}` of the same files"
        if shutil.which(program) is None:
            rows.append(Row(name, f"≤ {bound:.2f}", f"{program} is not installed", "", None))
            continue
        commands = (
            Command(f"fp8pack verify {fp8} -q", folder, PACKED),
            Command(f"cd {fp8} && {other} *", folder, COPY),
        )
        verifies, digests = bench.measure(name, commands, bench.rounds)
        rows.append(_ratio(name, {"fp8pack": verifies, program: digests}, bound=bound))
        if program == "sha256sum":
            peaks = [cost.peak_nbytes / 2**20 for cost in verifies]
            passed = max(peaks) * 2**20 <= MAX_PEAK_NBYTES
            rows.append(
                Row("12. verify: peak memory, MiB", "≤ 300", f"{median(peaks):.0f}", _range(peaks, "{:.0f}"), passed)
            )
    return rows


def _make_fp8(bench: Bench) -> tuple[str, str]:
    """Make a model and pack it, on tmpfs; return the names of both."""
    _check_memory(bench)
    forget_all(bench.disk)
    source, fp8 = bench.make_llama(bench.tmpfs, bench.size), "models/fp8"
    line = f"fp8pack pack {source} -o {fp8} --scheme FP8_BLOCK -q --overwrite"
    call(["sh", "-c", line], cwd=bench.tmpfs)
    bench.commands.setdefault("models", []).append(line)
    return source, fp8


def _against_copy(bench: Bench, folder: Path, name: str, flags: str, *, bound: float) -> Row:
    if folder == bench.tmpfs:
        _check_memory(bench)
        forget_all(bench.disk)
    source = bench.make_llama(folder, bench.size)
    end, warm = (" && sync", folder / source) if folder == bench.disk else ("", None)
    commands = (
        Command(f"fp8pack pack {source} -o {PACKED} {flags}{end}", folder, PACKED, warm),
        Command(f"cp -r {source} {COPY}{end}", folder, COPY, warm),
    )
    packs, copies = bench.measure(name, commands, bench.rounds)
    return _ratio(name, {"fp8pack": packs, "cp": copies}, bound=bound)


def _ratio(name: str, costs: dict[str, list[Cost]], *, bound: float) -> Row:
    """The row of one command's wall time over another's, of runs that took turns."""
    ours, theirs = costs.values()
    ratios = [one.wall / other.wall for one, other in zip(ours, theirs, strict=True)]
    value = wall(ours) / wall(theirs)
    return Row(name, f"≤ {bound:.2f}", f"{value:.2f}", _range(ratios, "{:.2f}"), value <= bound, costs)


def _check_memory(bench: Bench) -> None:
    """Refuse to fill the memory: tmpfs holds the source, a copy of it and the packed model at once."""
    present = bench.model is not None or (bench.tmpfs / f"models/llama-{bench.size}").exists()
    needed = int(parse_size("size", bench.size) * (1.7 if present else 2.7))
    if (free := free_nbytes(bench.tmpfs)) < needed:
        raise CommandError(f"tmpfs rows need {format_size(needed)} and {format_size(free)} are free: lower --size")


def bench_peer(bench: Bench) -> list[Row]:
    """Row 4: bytes of input per second, the start of the process left out, against llm-compressor's model_free_ptq."""
    if parse_size("size", bench.size) < 2 * parse_size("size", SMALLER):
        raise CommandError(f"a rate needs a --size of at least twice {SMALLER}")
    _install_peer(bench.disk)
    name, folder = "4. GB/s of input, fp8pack / llm-compressor", bench.disk
    models = bench.make_llama(folder, SMALLER), bench.make_llama(folder, bench.size)
    (folder / "peers/quantize.py").write_bytes((HERE / "peer_llmcompressor.py").read_bytes())
    lines = {"fp8pack": f"fp8pack pack {{}} -o {PACKED} --scheme FP8_BLOCK && sync"}
    for workers in (1, 2):
        lines[f"llm-compressor x{workers}"] = f"{PEER}/bin/python peers/quantize.py {{}} {PACKED} {workers} && sync"
    commands = [Command(line.format(m), folder, PACKED, folder / m) for line in lines.values() for m in models]
    costs = bench.measure(name, commands, bench.peer_rounds)
    more = nbytes_of(folder / models[1]) - nbytes_of(folder / models[0])
    bench.drop(folder / models[0])
    seconds, rounds = {}, {}
    for tool, small, large in zip(lines, costs[::2], costs[1::2], strict=True):
        seconds[tool] = wall(large) - wall(small)
        rounds[tool] = [large[i].wall - small[i].wall for i in range(len(small))]
    best = min((tool for tool in lines if tool != "fp8pack"), key=lambda tool: seconds[tool])
    value = seconds[best] / seconds["fp8pack"]
    rates = ", ".join(f"{tool} {more / taken / 1e9:.3f}" for tool, taken in seconds.items())
    ratios = [theirs / ours for ours, theirs in zip(rounds["fp8pack"], rounds[best], strict=True)]
    named = {
        f"{tool}, {m}": costs[2 * i + j] for i, tool in enumerate(lines) for j, m in enumerate((SMALLER, bench.size))
    }
    return [Row(name, "≥ 10", f"{value:.1f} ({rates})", _range(ratios, "{:.1f}"), value >= 10, named)]


def _install_peer(folder: Path) -> None:
    python = folder / PEER / "bin/python"
    if python.exists():
        return
    call([sys.executable, "-m", "venv", str(folder / PEER)])
    (folder / "peers/constraints.txt").write_text(f"torch=={PEER_TORCH}\n")
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    try:
        call([*pip, f"torch=={PEER_TORCH}"])
        call([*pip, "-c", str(folder / "peers/constraints.txt"), "llmcompressor"])
    except CommandError:
        shutil.rmtree(folder / PEER)
        raise


def bench_memory(bench: Bench) -> list[Row]:
    """Row 5: the largest resident set of the process, default options."""
    folder = bench.disk
    large = f"models/llama-{bench.size}"
    cases = {
        f"{bench.size} in 4 shards": (large, f"--size {bench.size} --shards 4"),
        "one tensor of 8 GiB": ("models/one-tensor", "--one-tensor 8GiB"),
        "45,000 small tensors": ("models/small-tensors", "--small-tensors 45000"),
    }
    rows = []
    for what, (model, arguments) in cases.items():
        name = f"5. peak memory, MiB, {what}"
        bench.make_model(folder, model, arguments)
        (costs,) = bench.measure(name, [Command(f"fp8pack pack {model} -o {PACKED}", folder, PACKED)], 3, 0)
        peaks = [cost.peak_nbytes / 2**20 for cost in costs]
        passed = max(peaks) * 2**20 <= MAX_PEAK_NBYTES
        rows.append(Row(name, "≤ 300", f"{median(peaks):.0f}", _range(peaks, "{:.0f}"), passed, {"fp8pack": costs}))
        bench.drop(folder / model)
    return rows


def bench_kernels(bench: Bench) -> list[Row]:
    """Row 6: seconds of torch in tiles / seconds of the kernel, one core, one process."""
    bench.commands["6. kernels"] = ["python benchmarks/kernels.py"]
    rows = []
    for found in json.loads(call([sys.executable, str(HERE / "kernels.py")])):
        bound = 2.5 if found["granularity"] in ("block:128x128", "channel") else 1.0
        kernel, torch = median(found["kernel"]), median(found["torch"])
        ratios = [theirs / ours for ours, theirs in zip(found["kernel"], found["torch"], strict=True)]
        value = f"{torch / kernel:.1f} ({found['input_nbytes'] / kernel / 1e9:.2f} GB/s of input)"
        cpu = {
            who: [Cost(s, s, 0.0, 0) for s in found[key]] for who, key in (("fp8pack", "kernel"), ("torch", "torch"))
        }
        name = f"6. torch / kernel, one core, {found['granularity']}"
        rows.append(Row(name, f"≥ {bound}", value, _range(ratios, "{:.1f}"), torch / kernel >= bound, cpu))
    return rows


def bench_first(bench: Bench) -> list[Row]:
    """Row 7: what the first pack on a machine pays for compiling the kernels."""
    name = "7. first pack minus the next, s"
    model = bench.make_model(bench.tmpfs, *TINY)
    command = Command(f"fp8pack pack {model} -o {PACKED}", bench.tmpfs, PACKED)
    bench.commands[name] = [f"FP8PACK_CACHE_DIR=empty {command.line}", f"FP8PACK_CACHE_DIR=filled {command.line}"]
    firsts, nexts = [], []
    for number in range(4):  # the first does not count: it caches Python's byte code
        with tempfile.TemporaryDirectory(dir=bench.tmpfs) as cache:
            pair = [run(command, {"FP8PACK_CACHE_DIR": cache}) for _ in range(2)]
        if number:
            firsts.append(pair[0])
            nexts.append(pair[1])
    extra = [first.wall - later.wall for first, later in zip(firsts, nexts, strict=True)]
    costs = {"first": firsts, "next": nexts}
    return [Row(name, "≤ 3", f"{median(extra):.2f}", _range(extra, "{:.2f}"), median(extra) <= 3, costs)]


def bench_startup(bench: Bench) -> list[Row]:
    """Row 8: `--help`, and that packing on a CPU leaves torch alone."""
    names = "8. `fp8pack --help`, s", "8. modules of torch that a pack on a CPU imports"
    (costs,) = bench.measure(names[0], [Command("fp8pack --help", bench.tmpfs, PACKED)], 10)
    walls = [cost.wall for cost in costs]
    rows = [
        Row(names[0], "≤ 0.30", f"{median(walls):.3f}", _range(walls, "{:.3f}"), median(walls) <= 0.3, {"help": costs})
    ]
    model = bench.make_model(bench.tmpfs, *TINY)
    line = f"python -X importtime -m fp8pack pack {model} -o {PACKED}"
    (pack,) = bench.measure(names[1], [Command(line, bench.tmpfs, PACKED)], 1)
    log = (bench.tmpfs / "log.txt").read_text()
    imported = [line.rpartition("|")[2].strip() for line in log.splitlines() if line.startswith("import time:")]
    count = sum(module == "torch" or module.startswith("torch.") for module in imported)
    passed = count == 0 and "fp8pack.packing.pack" in imported
    return [*rows, Row(names[1], "0", str(count), f"of {len(imported)}", passed, {"fp8pack": pack})]


def bench_oracle(bench: Bench) -> list[Row]:
    """Row 9: bytes of payloads and scales that an oracle without any code of fp8pack gives as well."""
    name = "9. bytes equal to the oracle, %"
    bench.commands[name] = ["python benchmarks/oracle.py WORK"]
    with tempfile.TemporaryDirectory(dir=bench.tmpfs) as work:
        found = json.loads(call([sys.executable, str(HERE / "oracle.py"), work]))
    total, equal = (sum(one[key] for one in found) for key in ("bytes", "equal"))
    shares = [100 * one["equal"] / one["bytes"] for one in found]
    value = f"{100 * equal / total:.6g} (of {total:,} in {len(found)} packs)"
    return [Row(name, "100", value, _range(shares, "{:.6g}"), equal == total)]


BENCHES: dict[str, Callable[[Bench], list[Row]]] = {
    "tmpfs": bench_tmpfs,
    "convert": bench_convert,
    "verify": bench_verify,
    "two-pass": bench_two_pass,
    "disk": bench_disk,
    "peer": bench_peer,
    "memory": bench_memory,
    "kernels": bench_kernels,
    "first": bench_first,
    "startup": bench_startup,
    "oracle": bench_oracle,
}


def _range(values: Sequence[float], form: str) -> str:
    return f"{form.format(min(values))} to {form.format(max(values))}"


def measure_all(bench: Bench, names: Sequence[str], out: Path | None) -> list[Row]:
    """Run benchmarks by name, write the results as they come; what cannot run becomes a row that says why."""
    rows: list[Row] = []
    for name in names:
        print(f"{name} …", file=sys.stderr)
        try:
            rows += BENCHES[name](bench)
        except CommandError as error:
            rows.append(Row(f"{name}: not measured", "", str(error), "", None))
        text = markdown(
            sorted(rows, key=lambda row: row.name), bench.commands, (bench.tmpfs, bench.disk), bench.disk / PEER
        )
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(text, encoding="utf-8")
    print(text)
    return rows


def main() -> None:
    """Read the arguments, measure, clean up; exit code 1 when a bound is not met."""
    shm = Path("/dev/shm")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="counted rounds (7)")
    parser.add_argument("--peer-rounds", type=int, default=3, help="counted rounds against llm-compressor (3)")
    parser.add_argument("--size", default="4GiB", help="of the large model; tmpfs rows take 2.7 times as much memory")
    parser.add_argument("--work", type=Path, default=shm if shm.is_dir() else Path(tempfile.gettempdir()), help="tmpfs")
    parser.add_argument("--disk", type=Path, default=Path(), help="a directory on a disk, 25 GB (the current one)")
    parser.add_argument("--model", type=Path, help="a model of --size on the tmpfs, to use instead of making one")
    parser.add_argument(
        "--keep-model", action="store_true", help="use models of an earlier run, leave them for the next"
    )
    parser.add_argument("--only", action="append", choices=BENCHES, help="measure this alone; may be repeated")
    parser.add_argument("--out", type=Path, help="Markdown file for the results")
    args = parser.parse_args()
    tmpfs, disk = args.work.resolve() / NAME, args.disk.resolve() / f"{NAME}-disk"
    for folder in (tmpfs, disk):
        folder.mkdir(parents=True, exist_ok=True)
    os.environ["PYTHONPYCACHEPREFIX"] = str(disk / "bytecode")
    model = args.model.resolve() if args.model else None
    bench = Bench(tmpfs, disk, args.rounds, args.peer_rounds, args.size, model, args.keep_model)
    try:
        rows = measure_all(bench, args.only or list(BENCHES), args.out)
    finally:
        for folder in (tmpfs, disk):
            for path in folder.iterdir():
                if not (args.keep_model and path.name in ("models", "peers")):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            if not any(folder.iterdir()):
                folder.rmdir()
    sys.exit(0 if all(row.passed for row in rows) else 1)


if __name__ == "__main__":
    main()
