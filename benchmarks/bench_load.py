"""Measure loading on the CPU against its bounds on this machine, and write the results as Markdown.

    python benchmarks/bench_load.py --disk /some/disk --out docs/benchmarks/FILE.md
    python benchmarks/bench_load.py --rounds 9 --keep-model

Everything it makes lies in a directory `fp8pack-bench-load` under --disk, and is removed at the end. What is compared
takes turns in one process, and the page cache is warm: a disk plays no part. Linux only.
"""

import argparse
import gc
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from machine import hardware, versions
from measure import CommandError, environment, last_line, nbytes_of, read_all
from result import VERDICTS, Row

from fp8pack.units import format_size

HERE = Path(__file__).resolve().parent
NAME = "fp8pack-bench-load"
LARGE, EXPERTS = "large-fp8", "experts-fp8"
LARGE_SIZE = "2400MiB"  # of BF16: about 1.5 GB packed, a third of which is embeddings that stay BF16
NUM_EXPERTS, NUM_LAYERS = 500, 10
MATRICES = ("gate_proj", "up_proj", "down_proj")
FIXED_SECONDS, SECONDS_A_TENSOR = 50e-3, 20e-6
MAX_RATIO = 1.0
TRIALS = 7
PIECE_NBYTES = 64 << 10  # widened to int64 it fits into a cache of its own
SPARE = 3  # rounds for each that counts


@dataclass(frozen=True, slots=True)
class Bench:
    """Where and how often to measure."""

    folder: Path
    rounds: int


# ---------------------------------------------------------------- what is measured, in a process of its own


def sum_of_bytes(tensors: Iterable[Any]) -> int:
    """Return the sum of all bytes; in pieces, because torch.sum widens what it adds to int64, eight times as large."""
    import torch

    views = (tensor.reshape(-1).view(torch.uint8) for tensor in tensors if tensor.numel())
    return sum(int(piece.sum()) for view in views for piece in view.split(PIECE_NBYTES))


def largest_bytes(tensors: Iterable[Any]) -> int:
    """Return the sum of each tensor's largest byte: one read of every byte, and next to no work beside it."""
    import torch

    return sum(int(tensor.reshape(-1).view(torch.uint8).amax()) for tensor in tensors if tensor.numel())


READERS = {"sum": sum_of_bytes, "largest": largest_bytes}  # each the same function for both loaders


def ours(folder: Path) -> Any:
    """`fp8pack.load_packed`: a mapping that makes its tensors when they are asked for."""
    import fp8pack

    return fp8pack.load_packed(folder)


def tensors_of(loaded: Any) -> Iterator[Any]:
    """Every stored tensor of a loaded checkpoint: payloads, scales and what was copied."""
    import fp8pack

    for value in loaded.values():
        if isinstance(value, fp8pack.PackedTensor):
            yield value.qdata
            yield value.stored_scale
        else:
            yield value


def theirs(folder: Path) -> Any:
    """`safetensors.torch.load_file` of each shard."""
    from safetensors.torch import load_file

    return [load_file(path) for path in sorted(folder.glob("*.safetensors"))]


def compare(folder: Path, rounds: int) -> dict[str, Any]:
    """Load and read every byte with both loaders in turn, in changing order; a first round is discarded."""
    sides: dict[str, tuple[Callable[[Path], Any], Callable[[Any], Iterable[Any]]]] = {
        "fp8pack": (ours, tensors_of),
        "safetensors": (theirs, lambda shards: (tensor for shard in shards for tensor in shard.values())),
    }
    import torch

    torch.set_num_threads(1)  # two that wait for each other would measure what else the machine does
    runs: dict[str, dict[str, list[dict[str, float]]]] = {}
    for reader, read in READERS.items():
        found = []
        for number in range(SPARE * rounds + 1):
            others, costs = other_work(), {}
            for side in reversed(sides) if number % 2 else sides:
                load, tensors = sides[side]
                costs[side] = _load_and_read(folder, load, lambda loaded: read(tensors(loaded)))  # noqa: B023
            if len({total for _, total in costs.values()}) > 1:
                raise AssertionError("the two loaders read different bytes")
            found.append((others(), {side: cost for side, (cost, _) in costs.items()}))
        quiet = sorted(found[1:], key=lambda item: item[0])[:rounds]
        runs[reader] = {side: [costs[side] | {"others": others} for others, costs in quiet] for side in sides}
    return runs


def other_work() -> Callable[[], float]:
    """Start to watch; the function returned says how many processors others have kept busy since."""

    def busy() -> float:
        ticks = [int(word) for word in Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]]
        return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")  # all but idle and waiting for a disk

    before = time.perf_counter(), busy(), time.process_time()
    return lambda: (busy() - before[1] - time.process_time() + before[2]) / (time.perf_counter() - before[0])


def _load_and_read(
    folder: Path, load: Callable[[Path], Any], read: Callable[[Any], int]
) -> tuple[dict[str, float], int]:
    gc.collect()  # what the run before mapped is given back before the clock starts
    before, begin = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    loaded = load(folder)
    middle = time.perf_counter()
    total = read(loaded)
    end, after = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    cost = {
        "load": middle - begin,
        "wall": end - begin,
        "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "faults": after.ru_minflt - before.ru_minflt,
    }
    return cost, total


def load_alone(folder: Path, trials: int) -> dict[str, Any]:
    """Time `load_packed` alone: the first call of this process, then others; and making every tensor after it."""
    begin = time.perf_counter()
    import fp8pack

    fp8pack.load_packed  # noqa: B018  (resolves the name, which imports torch)
    imported = time.perf_counter() - begin
    seconds, making = [], []
    for _ in range(trials + 1):
        gc.collect()
        begin = time.perf_counter()
        loaded = fp8pack.load_packed(folder)
        middle = time.perf_counter()
        count = sum(1 for _ in tensors_of(loaded))
        seconds.append(middle - begin)
        making.append(time.perf_counter() - middle)
        del loaded
    return {"import": imported, "first": seconds[0], "next": seconds[1:], "making": making[1:], "tensors": count}


# ---------------------------------------------------------------- the rows


def bench_read(bench: Bench) -> list[Row]:
    """Loading and reading every byte, against safetensors on the same files."""
    found = _in_process(bench, "compare", LARGE, bench.rounds)
    rows = []
    for reader, spoken in (("sum", "the sum of all bytes"), ("largest", "the largest byte of each tensor")):
        runs = found[reader]
        for name, key, bound in (
            (f"1. load_packed and {spoken} / safetensors", "wall", MAX_RATIO),
            ("1. the same, user + system seconds", "cpu", None),
            ("1. of that, loading alone", "load", None),
        ):
            mine, others = ([run[key] for run in runs[side]] for side in ("fp8pack", "safetensors"))
            ratios = [a / b for a, b in zip(mine, others, strict=True)]
            value = median(mine) / median(others)
            shown = f"{value:.3f} ({median(mine):.4g} s / {median(others):.4g} s)"
            passed = None if bound is None else value <= bound
            rows.append(Row(name, f"≤ {bound:.2f}" if bound else "", shown, span(ratios, "{:.3f}"), passed))
        faults = ", ".join(f"{side} {median(run['faults'] for run in runs[side]):,.0f}" for side in runs)
        others = [run["others"] for run in runs["fp8pack"]]
        rows += [
            Row("1. page faults of a run", "", faults, "", None),
            Row("1. processors that others kept busy", "", f"{median(others):.2f}", span(others, "{:.2f}"), None),
        ]
    return rows


def bench_load(bench: Bench) -> list[Row]:
    """`load_packed` alone, median of calls after the first of the process."""
    rows = []
    for name, model in (("the checkpoint of row 1", LARGE), ("many small experts", EXPERTS)):
        found = _in_process(bench, "load", model, TRIALS)
        bound = FIXED_SECONDS + SECONDS_A_TENSOR * found["tensors"]
        label = f"2. load_packed alone, {name}, {found['tensors']:,} tensors, ms"
        value = median(found["next"])
        rows += [
            Row(label, f"≤ {bound * 1e3:.1f}", f"{value * 1e3:.1f}", span_ms(found["next"]), value <= bound),
            Row("2. the first call of the process, excluded, ms", "", f"{found['first'] * 1e3:.1f}", "", None),
            Row("2. importing it before that, ms", "", f"{found['import'] * 1e3:.0f}", "", None),
            Row(
                "2. making every tensor afterwards, ms",
                "",
                f"{median(found['making']) * 1e3:.1f}",
                span_ms(found["making"]),
                None,
            ),
        ]
    return rows


def span(values: Sequence[float], form: str) -> str:
    """Return the least and the largest of values."""
    return f"{form.format(min(values))} to {form.format(max(values))}"


def span_ms(seconds: Sequence[float]) -> str:
    """Return the least and the largest of seconds, in milliseconds."""
    return span([1e3 * one for one in seconds], "{:.1f}")


def _in_process(bench: Bench, what: str, model: str, count: int) -> Any:
    """Measure in a process of its own, with the page cache warm; nothing else of it is in memory then."""
    read_all(bench.folder / model)
    line = [str(HERE / "bench_load.py"), "--measure", what, "--model", str(bench.folder / model), "--count", str(count)]
    return json.loads(call([sys.executable, *line]))


def call(argv: Sequence[str]) -> str:
    """Run a helper that is not measured; return what it printed, or raise CommandError with its last line of stderr."""
    done = subprocess.run(argv, capture_output=True, text=True, env=environment(), check=False)
    if done.returncode:
        raise CommandError(f"`{Path(argv[1]).name}` ended with {done.returncode}: {last_line(done.stderr)}")
    return done.stdout


# ---------------------------------------------------------------- models, results


def make_models(folder: Path) -> list[str]:
    """Make and pack the two models unless they are there already; return what was run."""
    from make_model import write_model

    groups = [
        {f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight": (128, 128) for name in MATRICES}
        for layer in range(NUM_LAYERS)
        for expert in range(NUM_EXPERTS)
    ]
    makers: dict[str, Callable[[Path], object]] = {
        LARGE: lambda path: call([sys.executable, str(HERE / "make_model.py"), str(path), "--size", LARGE_SIZE]),
        EXPERTS: lambda path: write_model(path, groups, 1),
    }
    for name, make in makers.items():
        if not (folder / name).exists():
            source = folder / "source"
            shutil.rmtree(source, ignore_errors=True)
            make(source)
            program = Path(sys.executable).parent / "fp8pack"
            call([str(program), "pack", str(source), "-o", str(folder / name), "--scheme", "FP8_BLOCK", "-q"])
            shutil.rmtree(source)
    return [
        f"python benchmarks/make_model.py source --size {LARGE_SIZE} --shards 4",
        f"fp8pack pack source -o {LARGE} --scheme FP8_BLOCK",
    ]


def document(title: str, text: str, rows: Sequence[Row], facts: Mapping[str, str], commands: Sequence[str]) -> str:
    """Return a result file: hardware and versions, the rows with their bounds, and the commands."""
    head = ("what", "bound", "median", "range", "verdict")
    lines = [(row.name, row.bound, row.value, row.spread, VERDICTS[row.passed] if row.bound else "") for row in rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *lines])
    shown = "\n".join(commands)
    listed = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    return "\n\n".join([f"# {title}", text, listed, "## Results", table, f"```sh\n{shown}\n```"]) + "\n"


def facts_of(folder: Path) -> dict[str, str]:
    """Return the date, the hardware and the versions of what was measured."""
    facts = {"Date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), **hardware([folder])}
    numbers = {name: number for name, number in versions(folder / "no-peer").items() if name != "cp"}
    facts["Versions"] = ", ".join(f"{name} {number}" for name, number in numbers.items())
    return facts


def measure_all(bench: Bench, out: Path | None) -> list[Row]:
    """Make the models, measure, write the results."""
    commands = [*make_models(bench.folder), f"python benchmarks/bench_load.py --rounds {bench.rounds}"]
    rows = [*bench_read(bench), *bench_load(bench)]
    size = format_size(nbytes_of(bench.folder / LARGE))
    text = (
        "Written by `python benchmarks/bench_load.py`. Row 1: a Llama of 5 layers packed with FP8_BLOCK, "
        f"{size}; both loaders take turns in one process, in changing order, {bench.rounds} rounds after one that does "
        "not count, page cache warm; one thread reads every byte once, the same function over views in uint8: "
        "`torch.sum` in pieces of 64 KiB, which is mostly adding, and `torch.amax`, which is mostly reading. Of three "
        "times as many rounds those count in which other processes took the least of the processors. "
        "The value is the ratio of the medians, the range that of the ratios within a round. Row 2: "
        f"`load_packed` alone, {TRIALS} calls after the first of a process; the bound is "
        f"{FIXED_SECONDS * 1e3:.0f} ms and {SECONDS_A_TENSOR * 1e6:.0f} µs for each tensor in the files, payloads and "
        "scales. Rows without "
        f"a bound are there to explain the others. The second model has {NUM_EXPERTS} experts in {NUM_LAYERS} layers, "
        "with three matrices of 128 x 128 each."
    )
    found = document("Loading on a CPU: benchmark results", text, rows, facts_of(bench.folder), commands)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(found, encoding="utf-8")
    print(found)
    return rows


def main() -> None:
    """Read the arguments, measure, clean up; exit code 1 when a bound is not met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31, help="counted rounds of row 1 (31)")
    parser.add_argument("--disk", type=Path, default=Path(tempfile.gettempdir()), help="a directory with 5 GB")
    parser.add_argument("--keep-model", action="store_true", help="use models of an earlier run, leave them")
    parser.add_argument("--out", type=Path, help="Markdown file for the results")
    parser.add_argument("--measure", choices=("compare", "load"), help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps((compare if args.measure == "compare" else load_alone)(args.model, args.count)))
        return
    folder = args.disk.resolve() / NAME
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["PYTHONPYCACHEPREFIX"] = str(folder / "bytecode")
    try:
        rows = measure_all(Bench(folder, args.rounds), args.out)
    except CommandError as error:
        print(f"bench_load.py: {error}", file=sys.stderr)
        sys.exit(1)
    finally:
        if not args.keep_model:
            shutil.rmtree(folder)
    sys.exit(0 if all(row.passed for row in rows if row.bound) else 1)


if __name__ == "__main__":
    main()
