"""Measure what compensated rounding, searched scales and budgets gain, beside rounding to nearest and llm-compressor.

    python benchmarks/bench_rounding.py --peer PEER --experts MODEL --out docs/benchmarks/rounding_MACHINE_YYYYMM.md

PEER: a virtual environment with llm-compressor. MODEL: what `examples/train_demo.py --experts 8` makes. Calibrated on
pieces of the training text of the demo model, of 256 tokens; evaluated on its held-out text. KL in nats, with 95 %
intervals over documents.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from bench_eval import make_model
from bench_quality import BEST, DEMO, WINDOW, documents, install_encoder, training_prompts
from machine import hardware, versions
from make_model import llama, write_model

import fp8pack
from fp8pack.calibration.recorder import Recorder, Rows, Threads
from fp8pack.checkpoint.calibration_file import write_calibration
from fp8pack.checkpoint.source import open_checkpoint
from fp8pack.evaluation.evaluation import Quality
from fp8pack.modelfacts.fused import fused_module
from fp8pack.modelfacts.spec import TensorSpec
from fp8pack.numerics.second_moments import BLOCK
from fp8pack.planning.calibration import Calibration

ROOT = Path(__file__).resolve().parents[1]
RUNS = 3
_Table = list[tuple[str, ...]]


def shown(found: Quality) -> str:
    """Return a KL divergence with its interval."""
    return f"{found.kl.value:.3g} ({found.kl.low:.3g} to {found.kl.high:.3g})"


class Bench:
    """A folder with a calibration of each kind, and the evaluations of a model."""

    def __init__(self, folder: Path, source: Path, prompts: Path, text: Path) -> None:
        self.folder, self.source, self.prompts = folder, source, prompts
        self._text = {"text": str(text), "max_length": WINDOW}
        self.calibrations = {kind: folder / f"{source.name}-{kind}.safetensors" for kind in ("blocks", "full")}
        for kind, path in self.calibrations.items():
            fp8pack.calibrate(
                source, path, prompts=str(prompts), num_prompts=512, max_length=WINDOW, second_moments=kind
            )

    def pack(self, name: str, kind: str = "", **how: Any) -> Path:
        """Pack in a way, compensated if a kind of second moments is given."""
        path = self.folder / f"{self.source.name}-{name.replace(' ', '-')}"
        if kind:
            how |= {"rounding": "compensated", "calibration": self.calibrations[kind]}
        fp8pack.pack(self.source, path, overwrite=True, **how)
        return path

    def kl(self, paths: Sequence[Path], activations: str = "declared") -> list[Quality]:
        """Evaluate checkpoints."""
        return list(fp8pack.evaluate(paths, self.source, activations=activations, **self._text).checkpoints)


def weights_alone(bench: Bench) -> _Table:
    """The first two rows: KL of weights alone, compensated over nearest."""
    how = {"scheme": "W8A16"}
    cases = {
        "to nearest": bench.pack("w-nearest", **how),
        "to nearest, --scales mse": bench.pack("w-mse", scales="mse", **how),
        "compensated, blocks": bench.pack("w-blocks", "blocks", **how),
        "compensated, blocks, --scales mse": bench.pack("w-blocks-mse", "blocks", scales="mse", **how),
        "compensated, full": bench.pack("w-full", "full", **how),
        "compensated, full, --scales mse": bench.pack("w-full-mse", "full", scales="mse", **how),
    }
    bounds = {"compensated, blocks, --scales mse": 0.45, "compensated, full, --scales mse": 0.25}
    found = bench.kl(list(cases.values()))
    return [
        (
            f"{bench.source.name}, weights alone: {name}",
            shown(quality),
            f"{quality.kl.value / found[0].kl.value:.3f}",
            f"<= {bounds[name]}" if name in bounds else "",
        )
        for name, quality in zip(cases, found, strict=True)
    ]


def peers(bench: Bench, python: Path) -> tuple[_Table, _Table]:
    """KL beside llm-compressor's, static, dynamic and GPTQ, and seconds beside those of its oneshot."""
    rows, times = [], []
    for scheme in ("FP8_DYNAMIC", "FP8"):
        theirs = {name: peer(bench, python, scheme, name)[0] for name in ("QuantizationModifier", "GPTQModifier")}
        calibration = {"calibration": bench.calibrations["full"]} if scheme == "FP8" else {}
        ours = {
            "fp8pack, to nearest": bench.pack(f"{scheme}-nearest", scheme=scheme, **calibration),
            "fp8pack, compensated, blocks": bench.pack(f"{scheme}-blocks", "blocks", scheme=scheme, scales="mse"),
            "fp8pack, compensated, full": bench.pack(f"{scheme}-full", "full", scheme=scheme, scales="mse"),
        }
        for activations in ("declared", "none"):
            found = bench.kl([*theirs.values(), *ours.values()], activations)
            names = ("llm-compressor, to nearest", "llm-compressor, GPTQ", *ours)
            for name, quality in zip(names, found, strict=True):
                plain, gptq = (quality.kl.value / other.kl.value for other in found[:2])
                bound = "<= 0.85 of nearest" if activations == "declared" and name.startswith("fp8pack, comp") else ""
                bound += "; <= 1 of GPTQ" if name.endswith("full") and bound else ""
                what = "activations and weights" if activations == "declared" else "weights alone"
                rows.append((f"{scheme}, {what}: {name}", shown(quality), f"{plain:.3f}, {gptq:.3f}", bound))
    larger = make_model(bench.folder / "hidden-1024", 1024, 2)
    few = training_prompts(bench.folder / "few.jsonl", 128)
    for source, prompts, runs in ((bench.source, bench.prompts, RUNS), (larger, few, 1)):
        theirs_s = [peer(bench, python, "FP8_DYNAMIC", "GPTQModifier", source, prompts)[1] for _ in range(runs)]
        for kind in ("blocks", "full"):
            ours_s = [calibrate_and_pack(bench, source, kind, prompts) for _ in range(runs)]
            ratio = median(theirs_s) / median(ours_s)
            spread = f"{min(ours_s):.1f} to {max(ours_s):.1f} s against {min(theirs_s):.1f} to {max(theirs_s):.1f} s"
            name = f"{source.name}: calibrate + pack, {kind}, times faster than oneshot with GPTQ"
            times.append((name, f"{ratio:.2f}", spread, ">= 3"))
    return rows, times


def peer(
    bench: Bench, python: Path, scheme: str, modifier: str, source: Path | None = None, prompts: Path | None = None
) -> tuple[Path, float]:
    """Quantize with llm-compressor; return the checkpoint, and the seconds of oneshot alone."""
    source = source or bench.source
    output = bench.folder / f"peer-{source.name}-{scheme}-{modifier}"
    shutil.rmtree(output, ignore_errors=True)
    words = [python / "bin/python", "-P", ROOT / "benchmarks/peer_oneshot.py", source, output, scheme, modifier]
    words += [prompts or bench.prompts, WINDOW]
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, check=True)
    seconds = next(line for line in done.stdout.splitlines() if line.startswith("seconds "))
    return output, float(seconds.split()[1])


def calibrate_and_pack(bench: Bench, source: Path, kind: str, prompts: Path) -> float:
    """Return the seconds of both, without importing torch, which those of oneshot do not have either."""
    path = bench.folder / "timed.safetensors"
    found = fp8pack.calibrate(
        source,
        path,
        prompts=str(prompts),
        num_prompts=512,
        max_length=WINDOW,
        second_moments=kind,
        overwrite=True,
    )
    packed = fp8pack.pack(
        source, bench.folder / "timed", scheme="FP8_DYNAMIC", calibration=path, overwrite=True, **BEST
    )
    return (found.seconds or 0.0) + (packed.seconds or 0.0)


def budgets(bench: Bench) -> _Table:
    """KL with at most 10 % more bytes by `keep`, beside none kept, and linears kept from both ends inwards."""
    how: dict[str, Any] = {"scheme": "FP8_DYNAMIC"}
    none = bench.pack("keep-none", **how)
    costs = fp8pack.evaluate_layers(none, bench.source, by="linear", text=str(bench.prompts), max_length=WINDOW)
    total = fp8pack.pack(bench.source, bench.folder / "x", dry_run=True, **how).output_nbytes
    allowed = f"bytes<={int(1.1 * total)}"
    kept = bench.pack("keep", keep=allowed, sensitivity=costs, **how)
    ends = bench.pack("ends", ignore=_from_both_ends(bench.source, int(1.1 * total), how), **how)
    both = bench.pack("keep-full", "full", scales="mse", keep=allowed, sensitivity=costs, **how)
    found = bench.kl([none, kept, ends, both])
    names = ("none kept", f"--keep '{allowed}'", "kept from both ends", "--keep, compensated, full, --scales mse")
    bounds = ("", "<= 0.5; below both ends", "", "")
    return [
        (f"FP8_DYNAMIC, {name}", shown(quality), f"{quality.kl.value / found[0].kl.value:.3f}", bound)
        for name, quality, bound in zip(names, found, bounds, strict=True)
    ]


def _from_both_ends(source: Path, allowed: int, how: dict[str, Any]) -> list[str]:
    """The linears of the first layer, of the last, of the second and so on, until the bytes are used."""
    plan = fp8pack.pack(source, Path("unused"), dry_run=True, **how)
    packed = [tensor.name for tensor in plan.tensors if tensor.action == "packed"]
    groups: dict[str, list[str]] = {}
    for name in packed:
        groups.setdefault(fused_module(name) or name, []).append(name)
    order = list(groups.values())
    inwards = [order[i // 2 if i % 2 == 0 else -1 - i // 2] for i in range(len(order))]
    kept: list[str] = []
    for group in inwards:
        more = fp8pack.pack(source, Path("unused"), dry_run=True, ignore=[*kept, *group], **how)
        if more.output_nbytes <= allowed:
            kept += group
    return kept


def calibrating(bench: Bench) -> _Table:
    """The time of calibrating with blocks over that without, in turns."""
    rows = []
    for source in (bench.source, make_model(bench.folder / "hidden-2048", 2048, 2)):
        ratios = []
        for _ in range(RUNS):
            seconds = {}
            for kind in ("none", "blocks"):
                path = bench.folder / "time.safetensors"
                found = fp8pack.calibrate(
                    source, path, prompts=str(bench.prompts), num_prompts=32, second_moments=kind, overwrite=True
                )
                seconds[kind] = found.seconds or 0.0
            ratios.append(seconds["blocks"] / seconds["none"])
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        rows.append((f"{source.name}: calibrate with blocks / without", f"{median(ratios):.2f}", spread, "<= 1.35"))
    return rows


def large(folder: Path) -> _Table:
    """Peak memory and time of a compensated pack of 4 GiB, hidden size 4096, beside rounding to nearest."""
    source = folder / "llama-4GiB"
    write_model(source, list(llama(4 << 30)), 4)
    calibration, opened = folder / "random.safetensors", open_checkpoint(source)
    rng, threads, groups = np.random.default_rng(0), Threads(1, os.cpu_count() or 1), dict[str, list[TensorSpec]]()
    for spec in opened.specs:
        if spec.name.endswith("_proj.weight"):
            groups.setdefault(fused_module(spec.name) or spec.name, []).append(spec)
    sites, rows = [], Rows.of(np.zeros(4 * BLOCK, np.int32))
    for group in groups.values():
        values = rng.integers(0x3C00, 0x4000, (4 * BLOCK, group[0].shape[1])).astype(np.uint16)
        recorder = Recorder([f"{spec.name.removesuffix('.weight')}.input" for spec in group], group[0].shape[1])
        recorder.add(values.ctypes.data, values.shape, rows, threads)
        recorder.add_moments(values, BLOCK, rows, threads)
        sites.append(recorder.site(1))
    write_calibration(calibration, Calibration(opened.fingerprint, ("blake3:a",), {}, tuple(sites)))
    found = {}
    for name, more in (
        ("nearest", []),
        ("compensated", ["--rounding", "compensated", "--calibration", str(calibration)]),
        (
            "compensated, --scales mse",
            ["--rounding", "compensated", "--scales", "mse", "--calibration", str(calibration)],
        ),
    ):
        words = [
            "pack",
            str(source),
            "-o",
            str(folder / "out"),
            "--scheme",
            "FP8_DYNAMIC",
            "--overwrite",
            "-q",
            "--json",
        ]
        fresh = ["sh", "-c", '"$@"; exit $?', "sh"]  # or the peak would be that of this process, which forked it
        command = [*fresh, sys.executable, "-m", "fp8pack", *words, *more]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[name] = json.loads(done.stdout)
    base = found["nearest"]["seconds"]
    return [
        (
            f"pack of 4 GiB, hidden size 4096, {name}",
            f"{result['peak_memory'] / 2**20:.0f} MiB",
            f"{result['seconds']:.1f} s, {result['seconds'] / base:.1f} of nearest",
            "<= 2048 MiB" if name != "nearest" else "",
        )
        for name, result in found.items()
    ]


def embeddings(folder: Path) -> _Table:
    """all-MiniLM-L6-v2: how far cosines and the order of all pairwise similarities are from the source's."""
    source = install_encoder(folder)
    calibrations = {}
    for kind in ("blocks", "full"):
        calibrations[kind] = folder / f"encoder-{kind}.safetensors"
        fp8pack.calibrate(source, calibrations[kind], num_prompts=64, second_moments=kind)
    paths = {"to nearest": folder / "encoder-nearest"}
    fp8pack.pack(source, paths["to nearest"], scheme="FP8_DYNAMIC")
    for kind, path in calibrations.items():
        paths[f"compensated, {kind}"] = folder / f"encoder-{kind}"
        fp8pack.pack(source, folder / f"encoder-{kind}", scheme="FP8_DYNAMIC", calibration=path, **BEST)
    rows: _Table = []
    for activations in ("declared", "none"):
        found = fp8pack.evaluate_encoder(list(paths.values()), source, activations=activations).checkpoints
        errors = [(1 - each.cosine.value, 1 - (each.rank_correlation or 0)) for each in found if each.cosine]
        for name, (cosine, rank) in zip(paths, errors, strict=True):
            ratios = f"{cosine / errors[0][0]:.3f}, {rank / errors[0][1]:.3f}"
            what = "activations and weights" if activations == "declared" else "weights alone"
            bound = "< 1" if name != "to nearest" else ""
            rows.append((f"all-MiniLM-L6-v2, {what}: {name}", f"{cosine:.2e}, {rank:.2e}", ratios, bound))
    return rows


def table(head: Sequence[str], rows: _Table) -> str:
    """Return a table of Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [tuple(head), ("---",) * len(head), *rows])


def main() -> None:
    """Measure and write the result file."""
    parser = argparse.ArgumentParser(description="Measure compensated rounding.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--peer", type=Path, required=True)
    parser.add_argument("--experts", type=Path, required=True)
    asked = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        prompts, text = training_prompts(folder / "training.jsonl"), documents(folder)
        demo = Bench(folder, DEMO, prompts, text)
        kl = ("what", "KL, mean (95 %)", "ratio", "bound")
        time_head = ("what", "median", "range", "bound")
        kls, times = peers(demo, asked.peer)
        parts = [
            "## Weights alone\n\nThe ratio is to rounding to nearest.",
            table(kl, weights_alone(demo) + weights_alone(Bench(folder, asked.experts, prompts, text))),
            "## Beside llm-compressor\n\nThe same prompts. Ratios: to its rounding to nearest, and to its GPTQ.",
            table(kl, kls),
            "## A budget of 10 % more bytes\n\nThe costs are measured on training text. The ratio is to none kept.",
            table(kl, budgets(demo)),
            "## Time and memory",
            table(time_head, times + calibrating(demo) + large(folder)),
            "## An embedding model\n\nOne minus the mean cosine of embeddings with the source's, and one minus the "
            "rank correlation of all pairwise similarities; ratios to rounding to nearest.",
            table(("what", "errors", "ratios", "bound"), embeddings(folder)),
        ]
        facts = {"Date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), **hardware([folder])}
    facts["Versions"] = ", ".join(f"{name} {number}" for name, number in versions(asked.peer / "bin/python").items())
    facts["Took"] = f"{time.monotonic() - began:.0f} s"
    head = ["# Compensated rounding, searched scales, budgets", "Written by `python benchmarks/bench_rounding.py`."]
    head.append("\n".join(f"- {name}: {value}" for name, value in facts.items()))
    asked.out.write_text("\n\n".join([*head, *parts]) + "\n")


if __name__ == "__main__":
    main()
