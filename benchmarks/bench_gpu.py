"""Measure loading and FP8 GEMMs on a CUDA device against their bounds, and write the results as Markdown.

    python benchmarks/bench_gpu.py --disk /some/disk --out docs/benchmarks/FILE.md
    python benchmarks/bench_gpu.py --only gemm --only linear

What is compared takes turns; a first round is discarded; values are medians, ranges those of the rounds. GEMMs are
of random normal data: zeros would draw less power and run faster. Exit code 2 without a CUDA device.
"""

import argparse
import gc
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench_load import call as run_helper
from bench_load import document, facts_of, span
from measure import CommandError, nbytes_of, read_all
from result import Row
from torch import Tensor
from torch.nn.functional import ScalingType, scaled_mm

import fp8pack
from fp8pack.gemm.activations import quantize_activation
from fp8pack.gemm.device import describe
from fp8pack.gemm.scheme import scheme_of
from fp8pack.gemm.torch_backend import TorchBackend, torch_problem
from fp8pack.numerics import torch_codec
from fp8pack.numerics.formats import E4M3
from fp8pack.numerics.granularity import BLOCK_128, CHANNEL, TENSOR, Granularity, parse_granularity

HERE = Path(__file__).resolve().parent
NAME, PACKED = "fp8pack-bench-gpu", "large-fp8"
MODEL_SIZE = "8GiB"  # of BF16
DEVICE = "cuda"
SIZE = 8192  # M, N and K
FEW_TOKENS = 16
RECIPES = {
    TENSOR: (ScalingType.TensorWise, ScalingType.TensorWise),
    CHANNEL: (ScalingType.RowWise, ScalingType.RowWise),
    BLOCK_128: (ScalingType.BlockWise1x128, ScalingType.BlockWise128x128),
}
MIN_PFLOPS = {TENSOR: 1.2, CHANNEL: 1.0, BLOCK_128: 0.8}
MIN_OF_COPY, MIN_OVER_SAFETENSORS = 0.8, 5.0
MIN_SPEEDUP, MIN_SPEEDUP_FEW = 1.5, 1.3
MIN_OF_BANDWIDTH, NBYTES_QUANTIZED = 0.7, 3  # BF16 is read, FP8 written
PINNED_NBYTES = 1 << 30
CALLS = 10  # that are timed together

Side = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Bench:
    """Where and how often to measure."""

    folder: Path
    rounds: int


# ---------------------------------------------------------------- clocks


def time_on_device(sides: Mapping[str, Side], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of one call by the clock of the device; sides make CALLS calls at a time, and take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name in reversed(sides) if number % 2 else sides:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            sides[name]()
            begin.record()
            sides[name]()
            end.record()
            torch.cuda.synchronize()
            if number:
                seconds[name].append(begin.elapsed_time(end) / 1e3 / CALLS)
    return seconds


def time_on_host(sides: Mapping[str, Side], rounds: int) -> dict[str, list[float]]:
    """Return the wall seconds of each side, until the device is done; the sides take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name in reversed(sides) if number % 2 else sides:
            gc.collect()
            torch.cuda.synchronize()
            begin = time.perf_counter()
            kept = sides[name]()
            torch.cuda.synchronize()
            if number:
                seconds[name].append(time.perf_counter() - begin)
            del kept
    return seconds


def repeated(call: Side) -> Side:
    """Return a side that makes CALLS calls."""

    def calls() -> None:
        for _ in range(CALLS):
            call()

    return calls


def captured(call: Side) -> Side:
    """Return a side that makes CALLS calls in one CUDA graph: what the host does for each is not measured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what is made at the first call must not be part of the graph
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph, calls = torch.cuda.CUDAGraph(), repeated(call)
    with torch.cuda.graph(graph):
        calls()
    return graph.replay


# ---------------------------------------------------------------- the rows


def bench_load(bench: Bench) -> list[Row]:
    """Rows 1 and 2: loading with a warm page cache, against a copy from pinned memory, and against safetensors."""
    from safetensors.torch import load_file

    folder = _make_model(bench.folder)
    read_all(folder)
    nbytes = nbytes_of(folder)
    pinned = torch.empty(PINNED_NBYTES, dtype=torch.uint8, pin_memory=True).random_()
    target = torch.empty_like(pinned, device=DEVICE)
    sides: dict[str, Side] = {
        "fp8pack": lambda: fp8pack.load_packed(folder, DEVICE),
        "copy": lambda: target.copy_(pinned, non_blocking=True),
        "safetensors": lambda: [load_file(path, device=DEVICE) for path in sorted(folder.glob("*.safetensors"))],
    }
    seconds = time_on_host(sides, bench.rounds)
    rates = {name: [nbytes / one / 1e9 for one in found] for name, found in seconds.items()}
    rates["copy"] = [PINNED_NBYTES / one / 1e9 for one in seconds["copy"]]
    return [
        _ratio("1. load_packed / copy from pinned memory, GB/s", rates["fp8pack"], rates["copy"], MIN_OF_COPY),
        _ratio(
            "2. load_packed / safetensors.torch.load_file, GB/s",
            rates["fp8pack"],
            rates["safetensors"],
            MIN_OVER_SAFETENSORS,
        ),
    ]


def bench_gemm(bench: Bench) -> list[Row]:
    """Row 3: the GEMM alone, of operands that are FP8 already; in a graph and eager, fast accumulation beside."""
    rows = []
    for granularity, bound in MIN_PFLOPS.items():
        name = f"3. GEMM {SIZE}^3, {granularity}, PFLOP/s"
        problem = torch_problem(scheme_of(E4M3, granularity), describe(torch.device(DEVICE)))
        if problem is not None:
            rows.append(Row(name, f"≥ {bound}", problem, "", None))
            continue
        gemm = _gemm(granularity)
        sides: dict[str, Side] = {"in a graph": captured(gemm), "eager": repeated(gemm)}
        try:
            fast = _gemm(granularity, fast=True)
            sides |= {"fast accumulation, in a graph": captured(fast), "fast accumulation, eager": repeated(fast)}
        except (RuntimeError, ValueError) as error:  # a library that has no such GEMM
            rows.append(Row(f"{name}, fast accumulation", "", str(error).splitlines()[0], "", None))
        for side, found in time_on_device(sides, bench.rounds).items():
            rates = [2 * SIZE**3 / one / 1e15 for one in found]
            value, bounded = median(rates), side == "in a graph"
            shown = f"≥ {bound}" if bounded else ""
            passed = value >= bound if bounded else None
            rows.append(Row(f"{name}, {side}", shown, f"{value:.3f}", span(rates, "{:.3f}"), passed))
    return sorted(rows, key=lambda row: row.name)


def bench_linear(bench: Bench) -> list[Row]:
    """Rows 4 and 5: fp8pack.linear, which quantizes its activation each time, against torch's linear in BF16."""
    rows = []
    plain = _normal(SIZE, SIZE)
    for tokens, bound in ((SIZE, MIN_SPEEDUP), (FEW_TOKENS, MIN_SPEEDUP_FEW)):
        x = _normal(tokens, SIZE)
        calls: dict[str, Side] = {"BF16": partial(torch.nn.functional.linear, x, plain)}
        backends = {}
        for granularity in MIN_PFLOPS:
            weight = _weight(granularity)
            backends[granularity.name] = weight.operand.backend.name
            calls[granularity.name] = partial(fp8pack.linear, x, weight)
        timed = captured if tokens == FEW_TOKENS else repeated
        seconds = time_on_device({name: timed(call) for name, call in calls.items()}, bench.rounds)
        for name, backend in backends.items():
            where = "in a graph" if tokens == FEW_TOKENS else "eager"
            label = f"{4 if tokens == SIZE else 5}. BF16 / fp8pack.linear, M = {tokens}, N = K = {SIZE}, {where}"
            rows.append(_ratio(f"{label}, {name} ({backend}), s", seconds["BF16"], seconds[name], bound))
    return rows


def bench_activations(bench: Bench) -> list[Row]:
    """Row 6: bytes per second of the kernel that quantizes activations, against those of a copy on the device."""
    x = _normal(2 * SIZE, SIZE)  # larger than the caches
    copy = torch.empty_like(x)
    kinds = (CHANNEL, parse_granularity("group:128"), TENSOR)
    padded = (x.shape[0], x.shape[1])
    sides: dict[str, Side] = {"copy": repeated(partial(copy.copy_, x))}
    for granularity in kinds:
        sides[granularity.name] = repeated(partial(quantize_activation, x, granularity, padded=padded))
    seconds = time_on_device(sides, bench.rounds)
    copied = [2 * x.nbytes / one / 1e9 for one in seconds["copy"]]
    rows = []
    for granularity in kinds:
        rates = [NBYTES_QUANTIZED * x.numel() / one / 1e9 for one in seconds[granularity.name]]
        # One scale for the tensor needs its amax first: x is read twice, so 3 bytes an element cannot be all.
        bound = None if granularity == TENSOR else MIN_OF_BANDWIDTH
        rows.append(_ratio(f"6. quantizing activations, {granularity} / copy, GB/s", rates, copied, bound))
    return rows


BENCHES: dict[str, Callable[[Bench], list[Row]]] = {
    "load": bench_load,
    "gemm": bench_gemm,
    "linear": bench_linear,
    "activations": bench_activations,
}


def _ratio(name: str, ones: Sequence[float], others: Sequence[float], bound: float | None) -> Row:
    """The row of one median over another; the range is that of the ratios within a round."""
    value = median(ones) / median(others)
    ratios = [a / b for a, b in zip(ones, others, strict=True)]
    shown = f"{value:.3f} ({median(ones):.4g} / {median(others):.4g})"
    passed = None if bound is None else value >= bound
    return Row(name, "" if bound is None else f"≥ {bound}", shown, span(ratios, "{:.3f}"), passed)


# ---------------------------------------------------------------- operands


def _normal(rows: int, cols: int) -> Tensor:
    return torch.randn(rows, cols, device=DEVICE, dtype=torch.bfloat16)


def _quantized(granularity: Granularity) -> tuple[Tensor, Tensor]:
    return torch_codec.quantize(_normal(SIZE, SIZE), granularity.region((SIZE, SIZE)), format=E4M3)


def _weight(granularity: Granularity) -> fp8pack.PackedTensor:
    payload, scale = _quantized(granularity)
    region = granularity.region((SIZE, SIZE))
    return fp8pack.PackedTensor("weight", payload, scale, E4M3.name, granularity.name, region, torch.bfloat16)


def _gemm(granularity: Granularity, *, fast: bool = False) -> Side:
    """Return a GEMM of operands that are FP8 already, scales laid out."""
    scheme = scheme_of(E4M3, granularity)
    weight = TorchBackend().prepare(*_quantized(granularity), scheme)
    activation = scheme.activation or TENSOR
    payload, scale = quantize_activation(_normal(SIZE, SIZE), activation, padded=(SIZE, SIZE))
    recipe_a, recipe_b = RECIPES[granularity]

    def gemm() -> Tensor:
        return scaled_mm(
            payload,
            weight.payload.t(),
            scale_a=scale,
            scale_recipe_a=recipe_a,
            scale_b=weight.kernel_scale,
            scale_recipe_b=recipe_b,
            output_dtype=torch.bfloat16,
            use_fast_accum=fast,
        )

    gemm()  # so that one that is not served fails here
    return gemm


def _make_model(folder: Path) -> Path:
    """Make and pack a model, unless it is there already."""
    if not (folder / PACKED).exists():
        source = folder / "source"
        shutil.rmtree(source, ignore_errors=True)
        run_helper([sys.executable, str(HERE / "make_model.py"), str(source), "--size", MODEL_SIZE])
        program = str(Path(sys.executable).parent / "fp8pack")
        run_helper([program, "pack", str(source), "-o", str(folder / PACKED), "--scheme", "FP8_BLOCK", "-q"])
        shutil.rmtree(source)
    return folder / PACKED


# ---------------------------------------------------------------- all of it


def device_facts() -> dict[str, str]:
    """Return what the device is, its driver and its limits, as far as they can be had."""
    facts = describe(torch.device(DEVICE))
    properties = torch.cuda.get_device_properties(DEVICE)
    found = {
        "GPU": f"{facts.name}, SM{facts.capability[0]}{facts.capability[1]}, {properties.total_memory / 2**30:.0f} GiB",
        "CUDA of torch": ".".join(map(str, facts.toolkit)),
    }
    query = "driver_version,power.limit,clocks.max.sm"
    program = shutil.which("nvidia-smi")
    if program is not None:
        line = [program, f"--query-gpu={query}", "--format=csv,noheader", f"--id={torch.cuda.current_device()}"]
        said = subprocess.run(line, capture_output=True, text=True, check=False)
        if said.returncode == 0:
            found["Driver, power limit, largest clock"] = said.stdout.strip()
    return found


def measure_all(bench: Bench, names: Sequence[str], out: Path | None) -> list[Row]:
    """Run benchmarks by name, write the results as they come; what cannot run becomes a row that says why."""
    rows: list[Row] = []
    text = (
        f"Written by `python benchmarks/bench_gpu.py`: {bench.rounds} rounds after one that does not count, sides in "
        "turn and in changing order. Rows 1 and 2 are wall time until the device is done, page cache warm; the others "
        f"are by the clock of the device, {CALLS} calls at a time, on random normal data. A row without a bound is "
        "there to be seen beside the others. Bytes of row 6: 3 for each element, of the copy 4."
    )
    commands = [
        f"python benchmarks/make_model.py source --size {MODEL_SIZE}",
        f"fp8pack pack source -o {PACKED} --scheme FP8_BLOCK",
        "python benchmarks/bench_gpu.py",
    ]
    facts = facts_of(bench.folder) | device_facts()
    for name in names:
        print(f"{name} …", file=sys.stderr)
        try:
            rows += BENCHES[name](bench)
        except (CommandError, RuntimeError) as error:
            reason = (str(error).strip().splitlines() or ["no reason given"])[0]
            rows.append(Row(f"{name}: not measured", "all of it", reason, "", None))
        found = document("FP8 on a GPU: benchmark results", text, rows, facts, commands)
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(found, encoding="utf-8")
    print(found)
    return rows


def main() -> None:
    """Read the arguments, measure, clean up; exit code 1 when a bound is not met, 2 without a device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="counted rounds (9)")
    parser.add_argument("--disk", type=Path, default=Path(tempfile.gettempdir()), help="a directory with 14 GB")
    parser.add_argument("--keep-model", action="store_true", help="use the model of an earlier run, leave it")
    parser.add_argument("--only", action="append", choices=BENCHES, help="measure this alone; may be repeated")
    parser.add_argument("--out", type=Path, help="Markdown file for the results")
    args: Any = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_gpu.py: no CUDA device: nothing was measured", file=sys.stderr)
        sys.exit(2)
    folder = args.disk.resolve() / NAME
    folder.mkdir(parents=True, exist_ok=True)
    try:
        rows = measure_all(Bench(folder, args.rounds), args.only or list(BENCHES), args.out)
    finally:
        if not args.keep_model:
            shutil.rmtree(folder)
    sys.exit(0 if all(row.passed for row in rows if row.bound) else 1)


if __name__ == "__main__":
    main()
