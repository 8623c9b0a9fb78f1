"""Measure what calibrating costs in time and memory on this machine, and write the results as Markdown.

    python benchmarks/bench_calibrate.py --disk /some/disk --out docs/benchmarks/FILE.md
    python benchmarks/bench_calibrate.py --only observe --only demo

Everything it makes lies in a directory `fp8pack-bench-calibrate` under --disk, and is removed at the end. Only random
models are run, and the demo of this repository. Linux only.

This process stays small: the kernel counts the memory of the process that started a command as that command's own.
"""

import argparse
import json
import math
import os
import random
import shutil
import string
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from machine import hardware, versions
from measure import Command, CommandError, Cost, alternate, environment, last_line, nbytes_of, run
from result import VERDICTS

from fp8pack.inputs import parse_size
from fp8pack.units import format_size

NAME = "fp8pack-bench-calibrate"
ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "examples/demo-qwen3"
PROMPTS = ROOT / "calib_prompts/prompts.jsonl"
MAX_OVERHEAD = 1.15
MIN_SECONDS, MAX_PASSES = 0.15, 16  # of the passes that are timed together
QUIET = 0.1  # cores that others may use in a round that counts
MAX_SECONDS = 15  # of looking for quiet rounds, for one line of the table
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Part:
    """A section of the result file: a table, what to know about it, and the commands behind it."""

    title: str
    text: str
    head: tuple[str, ...]
    lines: list[tuple[str, ...]]
    commands: tuple[str, ...] = ()
    passed: bool = True


@dataclass(frozen=True, slots=True)
class Bench:
    """Where, how often and on how large a model to measure."""

    folder: Path
    rounds: int
    size: str

    def command(self, line: str, output: str, source: str | None = None) -> Command:
        """A command in the folder of the benchmark; with `source` it starts from a warm cache and ends on the disk."""
        return Command(line, self.folder, output, self.folder / source if source else None)

    def calibrate(self, line: str, extra: dict[str, str] | None = None) -> tuple[Cost, dict[str, Any]]:
        """Run `fp8pack calibrate … --json -q`; return its cost and what it printed."""
        cost = run(self.command(f"fp8pack calibrate {line} --overwrite --json -q", "unused"), extra)
        print(f"  {cost.wall:7.2f} s  {line}", file=sys.stderr)
        return cost, json.loads((self.folder / "log.txt").read_text())


# ---------------------------------------------------------------- 1. observing, in a process of its own


@dataclass(frozen=True, slots=True)
class Shape:
    """A model to observe: its classes in transformers, the arguments of its config, prompt lengths, whether bounded."""

    family: str
    config: dict[str, Any]
    lengths: tuple[int, ...] = (32, 256, 1024)
    experts: str = ""
    bounded: bool = True


def _sizes(hidden: int, intermediate: int, heads: int, kv_heads: int, head_dim: int) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "head_dim": head_dim}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    return sizes | {"num_hidden_layers": 4, "vocab_size": 4096, "max_position_embeddings": 2048}


_MOE = _sizes(1024, 3072, 16, 8, 128) | {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 768}
SHAPES = {
    "Qwen3, hidden 1024": Shape("Qwen3", _sizes(1024, 3072, 16, 8, 128)),
    "Qwen3, hidden 2048": Shape("Qwen3", _sizes(2048, 6144, 16, 8, 128)),
    "Llama, hidden 2048": Shape("Llama", _sizes(2048, 8192, 32, 8, 64)),
    "Qwen3-MoE, hidden 1024, 16 experts, top 4": Shape("Qwen3Moe", _MOE, experts="eager"),
    "the same, its own experts": Shape("Qwen3Moe", _MOE, experts="grouped_mm", bounded=False),
    "Qwen3, hidden 256 (the demo's shape)": Shape("Qwen3", _sizes(256, 512, 4, 2, 64), (32, 256), bounded=False),
}


def observe_in_process(rounds: int) -> list[dict[str, Any]]:
    """Time every shape and prompt length; runs in a process of its own, since torch is large."""
    import torch

    found = []
    with torch.no_grad():
        for name, shape in SHAPES.items():
            model = _random_model(shape)
            for length in shape.lengths:
                found.append({"name": name, "length": length, **_time_both(model, length, rounds)})
                print(f"  {name}, {length}: {_summary(found[-1])['ratio']:.3f}", file=sys.stderr)
    return found


def _random_model(shape: Shape) -> Any:
    import torch
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{shape.family}Config")(**shape.config)
    config.use_cache = False
    model = getattr(transformers, f"{shape.family}ForCausalLM")._from_config(config, dtype=torch.bfloat16).eval()
    if shape.experts:
        model.set_experts_implementation(shape.experts)
    return model


def _time_both(model: Any, length: int, rounds: int) -> dict[str, Any]:
    """Rounds of passes without and with `observe` in turn, the same tokens in both."""
    import fp8pack

    observation = fp8pack.observe(model)
    _pass(model, length, 2)
    passes = min(MAX_PASSES, max(1, math.ceil(MIN_SECONDS / min(_pass(model, length, 1)[0] for _ in range(3)))))
    pairs: list[dict[str, Any]] = []
    began, number = time.perf_counter(), 0
    while number <= rounds or time.perf_counter() - began < MAX_SECONDS:
        seconds = {}
        others = _other_work()
        for attached in (False, True) if number % 2 else (True, False):
            with observation if attached else nullcontext():
                seconds[attached] = _pass(model, length, passes, number)
        if number:  # the first does not count
            pairs.append({"detached": seconds[False], "attached": seconds[True], "others": others()})
        if sum(pair["others"] < QUIET for pair in pairs) == rounds:
            break
        number += 1
    pairs = sorted(pairs, key=lambda pair: pair["others"])[:rounds]
    return {"passes": passes, "pairs": pairs}


def _other_work() -> Callable[[], float]:
    """Start to watch; the function returned says how many cores other processes have kept busy since."""

    def busy() -> float:
        ticks = [int(word) for word in Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]]
        return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")  # all but idle and waiting for a disk

    before = time.perf_counter(), busy(), time.process_time()
    return lambda: (busy() - before[1] - time.process_time() + before[2]) / (time.perf_counter() - before[0])


def _pass(model: Any, length: int, passes: int, seed: int = 0) -> tuple[float, float]:
    """Return wall and CPU seconds of one forward pass, the mean of some."""
    import torch

    vocabulary = model.config.vocab_size
    ids = torch.randint(vocabulary, (passes, 1, length), generator=torch.Generator().manual_seed(seed))
    begin, cpu = time.perf_counter(), time.process_time()
    for one in ids:
        model(input_ids=one)
    return (time.perf_counter() - begin) / passes, (time.process_time() - cpu) / passes


def bench_observe(bench: Bench) -> list[Part]:
    """The same forward passes with and without `fp8pack.observe(model)`."""
    argv = [sys.executable, str(Path(__file__).resolve()), "--in-process", "--rounds", str(bench.rounds)]
    done = subprocess.run(argv, stdout=subprocess.PIPE, text=True, env=environment(), check=False)
    if done.returncode:
        raise CommandError(f"observing ended with {done.returncode}")
    lines, passed = [], True
    found = json.loads(done.stdout)
    for one in found:
        s, bounded = _summary(one), SHAPES[one["name"]].bounded
        met = s["ratio"] <= MAX_OVERHEAD
        passed = passed and (met or not bounded)
        times = (f"{s['detached'] * 1e3:.1f}", f"{s['attached'] * 1e3:.1f}", f"{s['ratio']:.3f}")
        spread = (f"{min(s['ratios']):.3f} to {max(s['ratios']):.3f}", f"{s['least']:.3f}", f"{s['cpu']:.3f}")
        bound = (f"≤ {MAX_OVERHEAD}", VERDICTS[met]) if bounded else ("", "")
        lines.append((one["name"], str(one["length"]), *times, *spread, f"{s['others']:.2f}", *bound))
    head = (
        "model",
        "tokens",
        "without, ms",
        "with, ms",
        "ratio",
        "range",
        "of minima",
        "of CPU",
        "others",
        "bound",
        "",
    )
    text = (
        "One BF16 pass of a random model from `transformers`, 4 layers, vocabulary 4096, batch 1, "
        f"{bench.rounds} rounds. Both sides take turns in one process with the same tokens, in changing order; "
        "entering and leaving the context is not timed. The ratio is the median of those within a round. Rounds in "
        f"which other processes keep more than {QUIET} cores busy are repeated, for {MAX_SECONDS} s at most, and the "
        "quietest count; `others` is the most of a round that counts: where it is not near 0, the row says little. "
        "Experts run one at a time while a model is observed, so the bound holds against the same (`eager`); "
        "transformers' own way (`grouped_mm`) and a model smaller than the bound speaks of are there to be seen."
    )
    title = "1. Observing: time of a pass with `fp8pack.observe` / without"
    command = ("python benchmarks/bench_calibrate.py --only observe",)
    return [Part(title, text, head, lines, command, passed)]


def _summary(one: dict[str, Any]) -> dict[str, Any]:
    off, on = ([pair[side] for pair in one["pairs"]] for side in ("detached", "attached"))
    ratios = [b[0] / a[0] for a, b in zip(off, on, strict=True)]
    return {
        "detached": median(a[0] for a in off),
        "attached": median(b[0] for b in on),
        "ratios": ratios,
        "ratio": median(ratios),
        "least": min(b[0] for b in on) / min(a[0] for a in off),
        "cpu": median(b[1] / a[1] for a, b in zip(off, on, strict=True)),
        "others": max(pair["others"] for pair in one["pairs"]),
    }


# ---------------------------------------------------------------- 2. one layer at a time


LAYER = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 32}
LAYER_NBYTES = 2 * (4 * 2048 * 2048 + 3 * 2048 * 5632 + 2 * 2048)
MODEL, STREAM_PROMPTS, PROMPT_TOKENS = "model", 128, 64
RESIDENT_PROMPTS, FEW, ONE_THREAD = 32, 8, {"OMP_NUM_THREADS": "1"}
HIDDEN_NBYTES = 2 * 2048  # of a token
MAX_STREAMED = 1 << 30


def make_checkpoint(folder: Path, nbytes: int) -> None:
    """Write a random Llama with a tokenizer of bytes, a layer a shard; runs in a process of its own."""
    import torch
    import transformers
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers

    config = transformers.LlamaConfig(
        **LAYER, num_hidden_layers=math.ceil(nbytes / LAYER_NBYTES), vocab_size=272, max_position_embeddings=2048
    )
    config.architectures, config.dtype, config.eos_token_id, config.bos_token_id = (
        ["LlamaForCausalLM"],
        "bfloat16",
        0,
        None,
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {
            name: tuple(value.shape) for name, value in transformers.LlamaForCausalLM(config).state_dict().items()
        }
    groups: dict[str, list[str]] = defaultdict(list)
    for name in shapes:
        groups[name.split(".")[2] if ".layers." in name else "rest"].append(name)
    weight_map = {}
    generator = torch.Generator().manual_seed(0)
    for i, names in enumerate(groups.values(), 1):
        file = f"model-{i:05}-of-{len(groups):05}.safetensors"
        tensors = {name: torch.empty(shapes[name], dtype=torch.bfloat16) for name in names}
        for tensor in tensors.values():
            tensor.fill_(1.0) if tensor.ndim == 1 else tensor.normal_(0, 0.02, generator=generator)
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    alphabet = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)


def _prepare_large(bench: Bench) -> Path:
    model = bench.folder / MODEL
    if not model.exists():
        partial = bench.folder / "partial"
        partial.mkdir()
        argv = [sys.executable, str(Path(__file__).resolve()), "--make", str(partial), "--size", bench.size]
        done = subprocess.run(argv, env=environment(), stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise CommandError(f"making the model ended with {done.returncode}: {last_line(done.stderr)}")
        partial.rename(model)
        letters = random.Random(0)
        texts = ("".join(letters.choices(string.ascii_letters, k=PROMPT_TOKENS)) for _ in range(STREAM_PROMPTS))
        (bench.folder / "prompts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        os.sync()
    return model


def bench_stream(bench: Bench) -> list[Part]:
    """Peak memory of one layer at a time, and of the whole model; the same bytes on one thread."""
    model = _prepare_large(bench)
    runs = (
        ("on", STREAM_PROMPTS, {}),
        ("off", RESIDENT_PROMPTS, {}),
        ("on", FEW, ONE_THREAD),
        ("off", FEW, ONE_THREAD),
    )
    lines, commands, files, passed = [], [], [], True
    for mode, count, extra in runs:
        out = f"large-{mode}-{count}.safetensors"
        line = f"{MODEL} --prompts prompts.jsonl --num-prompts {count} --stream-layers {mode} -o {out}"
        cost, said = bench.calibrate(line, extra)
        bound = MAX_STREAMED + said["num_tokens"] * HIDDEN_NBYTES
        met = cost.peak_nbytes <= bound
        passed &= met or mode == "off"
        verdict = (f"≤ {bound / MIB:.0f}", VERDICTS[met]) if mode == "on" else ("", "")
        name = f"`--stream-layers {mode}`, {count} prompts{', one thread' if extra else ''}"
        times = (f"{cost.wall:.1f}", f"{cost.user:.1f} + {cost.system:.1f}", f"{said['num_tokens'] / cost.wall:.0f}")
        lines.append((name, f"{cost.peak_nbytes / MIB:.0f}", *times, *verdict))
        commands.append("".join(f"{key}={value} " for key, value in extra.items()) + f"fp8pack calibrate {line}")
        files.append((bench.folder / out).read_bytes())
    same = files[2] == files[3]
    lines.append(("the files of the last two", "", "", "", "", "identical", VERDICTS[same]))
    tokens = STREAM_PROMPTS * PROMPT_TOKENS
    text = (
        f"A random Llama of {format_size(nbytes_of(model))} in BF16, "
        f"{math.ceil(parse_size('size', bench.size) / LAYER_NBYTES)} layers of {LAYER_NBYTES / MIB:.0f} MiB, "
        f"hidden size "
        f"{LAYER['hidden_size']}. Prompts of {PROMPT_TOKENS} tokens: the hidden states of {STREAM_PROMPTS} "
        f"take {tokens * HIDDEN_NBYTES / MIB:.0f} MiB, in files, twice while a layer runs. The bound is 1 GiB and the "
        "hidden "
        "states. Peak: largest resident set of the process. Each was run once, so the seconds say little."
    )
    head = ("run", "peak, MiB", "wall, s", "user + sys, s", "tokens/s", "bound", "")
    title = f"2. Memory of `--stream-layers on`, {bench.size} of weights"
    return [Part(title, text, head, lines, tuple(commands), passed and same)]


# ---------------------------------------------------------------- 3. the demo


def bench_demo(bench: Bench) -> list[Part]:
    """Tokens a second, seconds, memory and file size of the default calibration of the demo."""
    lines, rates = [], []
    fewer, more = 16, 256
    costs: dict[int, list[tuple[Cost, int]]] = {fewer: [], more: []}
    for number in range(3):
        for count, found in costs.items():
            if number or count == fewer:  # the first does not count
                cost, said = bench.calibrate(f"{DEMO} --num-prompts {count} -o demo.safetensors")
                if number:
                    found.append((cost, said["num_tokens"]))
    for (cost, tokens), (small, few) in zip(costs[more], costs[fewer], strict=True):
        rates.append((tokens - few) / (cost.wall - small.wall))
    for count, found in costs.items():
        walls = [cost.wall for cost, _ in found]
        peak = max(cost.peak_nbytes for cost, _ in found) / MIB
        name = f"{count} prompts, {found[0][1]} tokens"
        cpu = f"{median(c.user for c, _ in found):.1f} + {median(c.system for c, _ in found):.1f}"
        lines.append((name, f"{median(walls):.1f} s", f"{min(walls):.1f} to {max(walls):.1f}", cpu, f"{peak:.0f}"))
    total = [tokens / cost.wall for cost, tokens in costs[more]]
    for name, values in (("tokens/s, starting up included", total), ("tokens/s of what lies between the two", rates)):
        lines.append((name, f"{median(values):.0f}", f"{min(values):.0f} to {max(values):.0f}", "", ""))
    size = (bench.folder / "demo.safetensors").stat().st_size
    lines.append(("calibration file", f"{size / 1e3:.0f} kB", "", "", ""))
    head = ("what", "median", "range", "user + sys, s", "peak, MiB")
    text = (
        f"The demo has 4 layers of hidden size 256 ({format_size(nbytes_of(DEMO))} with its tokenizer) and runs the "
        "built-in prompts, cut to its 256 positions. Two runs after one that does not count. No bound."
    )
    command = ("fp8pack calibrate examples/demo-qwen3 --num-prompts 256 -o demo.safetensors",)
    return [Part("3. `fp8pack calibrate` on the demo", text, head, lines, command)]


# ---------------------------------------------------------------- 4. merge and pack


def bench_use(bench: Bench) -> list[Part]:
    """Seconds of `merge` of two halves; `pack` with static activations against dynamic ones."""
    return [_bench_merge(bench), _bench_pack(bench)]


def _halves(bench: Bench, name: str, model: str, prompts: Path, count: int) -> str:
    """Calibrate both halves of the first `count` prompts; return the command that merges them."""
    rows = prompts.read_text(encoding="utf-8").splitlines(keepends=True)[:count]
    for half, part in (("a", rows[: count // 2]), ("b", rows[count // 2 :])):
        (bench.folder / f"{half}.jsonl").write_text("".join(part), encoding="utf-8")
        options = f"--prompts {half}.jsonl --num-prompts {len(part)} --stream-layers off"
        bench.calibrate(f"{model} {options} -o {name}-{half}.safetensors")
    return f"fp8pack merge {name}-a.safetensors {name}-b.safetensors -o {name}.safetensors --overwrite -q"


def _bench_merge(bench: Bench) -> Part:
    _prepare_large(bench)
    merges = {
        "demo, 2 x 128 prompts": _halves(bench, "demo", str(DEMO), PROMPTS, 256),
        f"{bench.size}, 2 x 4 prompts": _halves(bench, "large", MODEL, bench.folder / "prompts.jsonl", 8),
    }
    every = [bench.command(line, "unused") for line in merges.values()]
    lines = []
    for (name, line), costs in zip(merges.items(), alternate(every, bench.rounds), strict=True):
        walls = [cost.wall for cost in costs]
        size = (bench.folder / line.split()[2]).stat().st_size / 1e6
        spread = (f"{median(walls):.3f}", f"{min(walls):.3f} to {max(walls):.3f}")
        cpu = f"{median(c.user for c in costs):.2f} + {median(c.system for c in costs):.2f}"
        lines.append((name, f"{size:.2f}", *spread, cpu, f"{max(c.peak_nbytes for c in costs) / MIB:.0f}"))
    head = ("what", "MB a half", "wall, s", "range", "user + sys, s", "peak, MiB")
    text = f"The whole process; {bench.rounds} rounds after one that does not count. No bound."
    return Part("4. `fp8pack merge` of two halves", text, head, lines, tuple(merges.values()))


def _bench_pack(bench: Bench) -> Part:
    lines, commands = [], []
    if not (bench.folder / "demo-source").exists():
        shutil.copytree(DEMO, bench.folder / "demo-source")
    for name, model, calibration in (("demo", "demo-source", "demo"), (bench.size, MODEL, "large")):
        line = f"fp8pack pack {model} -o {{}} -q"
        tools = {
            "FP8, static": bench.command(
                f"{line.format('s')} --scheme FP8 --calibration {calibration}.safetensors && sync", "s", model
            ),
            "FP8_DYNAMIC": bench.command(f"{line.format('d')} --scheme FP8_DYNAMIC && sync", "d", model),
            "tensor scales, dynamic": bench.command(
                f"{line.format('t')} --granularity tensor --quant-method fp8 && sync", "t", model
            ),
        }
        costs = dict(zip(tools, alternate(list(tools.values()), bench.rounds), strict=True))
        static = [cost.wall for cost in costs["FP8, static"]]
        for tool, found in costs.items():
            walls = [cost.wall for cost in found]
            ratios = [a / b for a, b in zip(static, walls, strict=True)]
            spread = (f"{median(walls):.2f}", f"{min(walls):.2f} to {max(walls):.2f}")
            cpu = f"{median(c.user for c in found):.2f} + {median(c.system for c in found):.2f}"
            peak = f"{max(c.peak_nbytes for c in found) / MIB:.0f}"
            ratio = ("", "") if tool == "FP8, static" else (f"{median(ratios):.2f}", _span(ratios))
            lines.append((name, tool, *spread, cpu, peak, *ratio))
        commands += [command.line for command in tools.values()]
    head = ("model", "pack", "wall, s", "range", "user + sys, s", "peak, MiB", "static / this", "range")
    text = (
        "Whole processes that end in `sync`, source in the page cache, taking turns; "
        f"{bench.rounds} rounds after one that does not count. FP8 has one scale for a weight, so it reads every "
        "weight twice, once for the largest magnitude, where FP8_DYNAMIC has one for each channel; the third command "
        "does the same without a calibration. No bound."
    )
    return Part(
        "5. `pack --scheme FP8 --calibration` / `pack --scheme FP8_DYNAMIC`", text, head, lines, tuple(commands)
    )


def _span(values: Sequence[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


# ---------------------------------------------------------------- all of it


BENCHES: dict[str, Callable[[Bench], list[Part]]] = {
    "observe": bench_observe,
    "demo": bench_demo,
    "stream": bench_stream,
    "use": bench_use,
}


def markdown(parts: Sequence[Part], folder: Path) -> str:
    """Return the result file."""
    from importlib.metadata import version

    facts = {"Date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), **hardware([folder])}
    numbers = versions(folder / "no-peer") | {name: version(name) for name in ("transformers", "tokenizers")}
    facts["Versions"] = ", ".join(f"{name} {number}" for name, number in numbers.items() if name != "cp")
    texts = [
        "# Calibration benchmark results",
        "Written by `python benchmarks/bench_calibrate.py`. Other work may run on the machine: what is compared takes "
        "turns, so ratios say more than seconds. `model` and `prompts.jsonl` in the commands are what it makes.",
        "\n".join(f"- {name}: {value}" for name, value in facts.items()),
    ]
    for part in sorted(parts, key=lambda part: part.title[:2] if part.title[0].isdigit() else "1z"):
        texts += [f"## {part.title}", part.text, _table(part.head, part.lines)]
        if part.commands:
            shown = (
                "\n".join(part.commands)
                .replace(str(DEMO), "examples/demo-qwen3")
                .replace("demo-source", "examples/demo-qwen3")
            )
            texts.append(f"```sh\n{shown}\n```")
    return "\n\n".join(texts) + "\n"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *lines])


def measure_all(bench: Bench, names: Sequence[str], out: Path | None, state: Path | None) -> bool:
    """Run benchmarks by name, write the results as they come; say whether every bound is met.

    state: keeps the parts of earlier runs, for those that are not measured again.
    """
    kept: dict[str, list[Part]] = {}
    if state is not None and state.exists():
        found = json.loads(state.read_text())
        kept = {name: [Part(**part) for part in found[name]] for name in BENCHES if name in found}
    for name in names:
        print(f"{name} …", file=sys.stderr)
        try:
            kept[name] = BENCHES[name](bench)
        except CommandError as error:
            kept[name] = [Part(f"{name}: not measured", str(error), (), [], passed=False)]
        if state is not None:
            state.write_text(json.dumps({key: [asdict(part) for part in value] for key, value in kept.items()}))
        parts = [part for value in kept.values() for part in value]
        text = markdown(parts, bench.folder)
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(text, encoding="utf-8")
    print(text)
    return all(part.passed for part in parts)


def main() -> None:
    """Read the arguments, measure, clean up; exit code 1 when a bound is not met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="counted rounds (9)")
    parser.add_argument("--size", default="4GiB", help="of the model that is run a layer at a time")
    parser.add_argument("--disk", type=Path, default=Path(tempfile.gettempdir()), help="a directory on a disk, 12 GB")
    parser.add_argument("--only", action="append", choices=BENCHES, help="measure this alone; may be repeated")
    parser.add_argument("--out", type=Path, help="Markdown file for the results")
    parser.add_argument("--state", type=Path, help="JSON file that keeps what was measured, to measure in several runs")
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.in_process:
        print(json.dumps(observe_in_process(args.rounds)))
        return
    if args.make:
        make_checkpoint(args.make, parse_size("size", args.size))
        return
    folder = args.disk.resolve() / NAME
    folder.mkdir(parents=True, exist_ok=True)  # the model of a run that was killed is used
    os.environ["PYTHONPYCACHEPREFIX"] = str(folder / "bytecode")
    try:
        passed = measure_all(Bench(folder, args.rounds, args.size), args.only or list(BENCHES), args.out, args.state)
    finally:
        shutil.rmtree(folder)
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
