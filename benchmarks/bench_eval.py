"""Measure what an evaluation costs: against a bare forward pass, and in memory; and inspect against pack.

    python benchmarks/bench_eval.py --out docs/benchmarks/eval_MACHINE_YYYYMM.md

Run it where fp8pack alone is installed: transformers loads torchao if it finds it, which is 200 MiB.

A Qwen3 of random weights is made; its logits mean nothing, and its arithmetic is that of a real one.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from machine import hardware, versions

import fp8pack

DEMO = Path(__file__).resolve().parents[1] / "examples" / "demo-qwen3"
SCHEMES = ("FP8_DYNAMIC", "FP8_BLOCK")
WINDOW, RUNS = 1024, 3
PEAK = """
import json, sys
from fp8pack.evaluation.evaluate import evaluate
evaluate(sys.argv[1], sys.argv[2], text=sys.argv[3], max_length=1024, num_tokens=2048, stream_layers=sys.argv[4])
with open("/proc/self/status") as status:
    kib = {key: int(rest.split()[0]) for key, _, rest in (line.partition(":") for line in status) if "kB" in rest}
print(kib["VmHWM"], kib["RssFile"])
"""


def make_model(folder: Path, hidden: int, layers: int) -> Path:
    """Write a Qwen3 with the tokenizer of the demo model."""
    import torch
    import transformers

    sizes: dict[str, Any] = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers}
    heads = {"num_attention_heads": hidden // 128, "num_key_value_heads": hidden // 256, "head_dim": 128}
    config = transformers.Qwen3Config(vocab_size=4096, max_position_embeddings=4096, **sizes, **heads)
    torch.manual_seed(0)
    transformers.Qwen3ForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(DEMO).save_pretrained(folder)
    return folder


def bare_forward(source: Path, ids: list[list[int]]) -> float:
    """Return the seconds of a forward pass of the source, float32, in windows, with logits of every position."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    started = time.monotonic()
    with torch.no_grad():
        for window in ids:
            model(torch.tensor([window]), use_cache=False)
    return time.monotonic() - started


def windows(tokens: int) -> tuple[str, list[list[int]]]:
    """Return a text of so many tokens of the demo's tokenizer, as documents of a window, and its ids."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    ids = tokenizer((DEMO / "heldout.txt").read_text())["input_ids"]
    ids = (ids * (1 + tokens // len(ids)))[:tokens]
    cuts = [ids[begin : begin + WINDOW] for begin in range(0, tokens, WINDOW)]
    return "".join(json.dumps({"text": tokenizer.decode(cut)}) + "\n" for cut in cuts), cuts


def main() -> None:
    """Measure and write the result file."""
    parser = argparse.ArgumentParser(description="Measure what an evaluation costs.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=16384)
    asked = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        text, ids = windows(asked.tokens)
        (folder / "text.jsonl").write_text(text)
        source = make_model(folder / "model", 1024, 8)
        given: dict[str, Any] = {"text": str(folder / "text.jsonl"), "max_length": WINDOW, "num_tokens": asked.tokens}
        for scheme in SCHEMES:
            fp8pack.pack(source, folder / scheme, scheme=scheme)
            ratios = []
            for _ in range(RUNS):
                bare = bare_forward(source, ids)
                ratios.append(fp8pack.evaluate(folder / scheme, source, **given).seconds / bare)
            what = f"eval of {scheme} / bare forward of the source, hidden size 1024, {asked.tokens} tokens"
            rows.append((what, "≤ 2.3", ratios, 2.3))
        wide = make_model(folder / "wide", 2048, 12)
        fp8pack.pack(wide, folder / "wide-fp8", scheme="FP8_DYNAMIC")
        layer = 4 * (2048 * 2048 * 3 + 3 * 2048 * 3 * 2048)  # float32: q, o, half of k and v, gate, up, down
        for how in ("on", "off"):
            words = [sys.executable, "-c", PEAK, str(folder / "wide-fp8"), str(wide), str(folder / "text.jsonl"), how]
            done = subprocess.run(words, capture_output=True, text=True, check=True)
            peak, mapped = (int(kib) / 1024 for kib in done.stdout.split()[-2:])
            bound = 2 * layer / 2**20 + 512
            limit, shown = (bound, f"≤ {bound:.0f}") if how == "on" else (float("inf"), "none")
            what = f"peak of eval, MiB, hidden size 2048, 12 layers, --stream-layers {how}"
            rows.append((what, shown, [peak], limit))
            rows.append((f"{what}, without mapped libraries", shown, [peak - mapped], limit))
        ratios = []
        for i in range(RUNS + 1):
            started = time.monotonic()
            fp8pack.pack(wide, folder / "again", scheme="FP8_DYNAMIC", overwrite=True)
            packed = time.monotonic() - started
            started = time.monotonic()
            fp8pack.inspect(folder / "again", wide)
            if i:  # the first compiles kernels
                ratios.append((time.monotonic() - started) / packed)
        rows.append(("inspect --against / pack, time", "≤ 2", ratios, 2.0))
        facts = {"Date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), **hardware([folder])}
    asked.out.write_text(page(rows, facts))


def page(rows: list[tuple[str, str, list[float], float]], facts: dict[str, str]) -> str:
    """Return the result file."""
    numbers = {name: number for name, number in versions(DEMO / "no-peer").items() if name != "cp"}
    facts["Versions"] = ", ".join(f"{name} {number}" for name, number in numbers.items())
    lines = [
        f"| {what} | {bound} | {median(found):.3g} | {min(found):.3g} to {max(found):.3g} | "
        f"{'PASS' if median(found) <= limit else '**NOT MET**'} |"
        for what, bound, found, limit in rows
    ]
    return (
        "\n\n".join(
            [
                "# What an evaluation costs",
                "Written by `python benchmarks/bench_eval.py`. An evaluation's time has everything in it: opening, "
                "loading, two models, divergences, intervals.",
                "\n".join(f"- {name}: {value}" for name, value in facts.items()),
                "| what | bound | median | range | verdict |\n| --- | --- | --- | --- | --- |\n" + "\n".join(lines),
            ]
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
