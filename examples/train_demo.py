"""Train the demo model: a small Qwen3 causal LM on the source text of the Python standard library.

The defaults give the checkpoint in examples/demo-qwen3 (same Python version, library versions and CPU). With experts,
for benchmarks: `python examples/train_demo.py --experts 8 --steps 1000 --output DIR`.
"""

import argparse
import hashlib
import json
import math
import os
import platform
import shutil
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCAB_SIZE, CONTEXT, BATCH_SIZE, THREADS = 4096, 256, 4, 2
PEAK_LR, FINAL_LR, WARMUP_STEPS, WEIGHT_DECAY, CLIP_NORM = 2e-3, 5e-5, 150, 0.1, 1.0
LOG_EVERY = 100
SHARD_SIZE = "4MB"
HELDOUT_MODULUS, EXCERPT_BYTES, HELDOUT_BYTES = 20, 4000, 32000
END_OF_TEXT, PAD = "<|endoftext|>", "<|pad|>"
STDLIB = Path(sysconfig.get_paths()["stdlib"])
SKIPPED = {"site-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data", "encodings", "turtledemo"}
SKIPPED |= {"ensurepip", "msilib", "entities.py"}
SKIPPED_PREFIXES = ("_sysconfigdata", "config-")
# Every linear dimension is a multiple of 128.
SHAPE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "max_window_layers": 4,
}
EXPERTS_SHAPE: dict[str, Any] = {"moe_intermediate_size": 256, "num_experts_per_tok": 2, "norm_topk_prob": True}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}

CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---

# demo-qwen3

A small Qwen3 causal language model, really trained, to demonstrate and test weight quantization.
It continues Python source text and is useful for nothing else.

- Model: `{model}`, {parameters:,} parameters (embedding tied with the output head), 4 layers,
  hidden 256, {mlp}, 4 query and 2 key/value heads of 64; BF16, two safetensors shards
- Tokenizer: byte-level BPE, 4096 tokens, trained on the same text
- Training text: the standard library of CPython {python}, {files} files, {stream:,} tokens
- Training: `python examples/train_demo.py --seed {seed} --steps {steps}{options}`; float32, AdamW, cosine schedule
  with warm-up, {steps:,} steps of {batch} x 256 tokens = {seen:,} tokens
- Wall time: {minutes:.1f} minutes, {threads} threads on {cores} cores of {cpu}; torch {torch}
- Held-out perplexity: **{perplexity:.2f}** (chance: 4096)

## Held-out text

`heldout.txt` holds the beginnings of files that neither the model nor the tokenizer saw: {names}.
`heldout.json` has the perplexity of this checkpoint, reloaded in bfloat16 on the CPU, over {windows}
non-overlapping windows of 256 tokens; the first token of a window is not predicted, and the incomplete last
window is left out. Licence headers and idioms recur across the library, so the number tells how well the
model knows this library's style, not Python at large.

## Licence

The weights and the tokenizer are under Apache-2.0. `heldout.txt` is from CPython {python}, Copyright (c)
2001-2023 Python Software Foundation; All Rights Reserved, under the PSF License Agreement, which is in
`heldout.LICENSE.txt`. Each file was cut to its first lines; nothing else was changed.
"""


def collect_sources() -> dict[str, str]:
    """Read the library's *.py files, sorted by name; tests, data tables and build details are left out."""
    sources = {}
    for path in sorted(STDLIB.rglob("*.py")):
        parts = path.relative_to(STDLIB).parts
        if not SKIPPED.intersection(parts) and not parts[0].startswith(SKIPPED_PREFIXES):
            sources["/".join(parts)] = path.read_text(encoding="utf-8", errors="replace")
    return sources


def is_heldout(name: str) -> bool:
    """Hold a file out of the training text by a hash of its name."""
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) % HELDOUT_MODULUS == 0


def heldout_excerpts(sources: dict[str, str]) -> dict[str, str]:
    """Take the first lines of held-out files, up to EXCERPT_BYTES each and HELDOUT_BYTES in all."""
    excerpts: dict[str, str] = {}
    total = 0
    for name in filter(is_heldout, sources):
        cut = sources[name].encode()[:EXCERPT_BYTES]
        cut = cut[: cut.rfind(b"\n") + 1]
        total += len(cut)
        if total > HELDOUT_BYTES:
            break
        excerpts[name] = cut.decode()
    return excerpts


def train_tokenizer(texts: list[str]) -> Any:
    """Train a byte-level BPE tokenizer of VOCAB_SIZE tokens."""
    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT, PAD],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode_corpus(tokenizer: Any, texts: list[str]) -> torch.Tensor:
    """Encode the files into one stream, each one preceded by the end-of-text token."""
    return torch.tensor([token for text in texts for token in tokenizer.encode(END_OF_TEXT + text).ids])


def build_model(tokenizer: Any, experts: int = 0) -> Any:
    """Make the untrained model in float32; with experts, two of them for each token."""
    ends: dict[str, Any] = {
        "eos_token_id": tokenizer.token_to_id(END_OF_TEXT),
        "pad_token_id": tokenizer.token_to_id(PAD),
    }
    sizes: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "max_position_embeddings": CONTEXT, **SHAPE, **ends}
    model: Any
    if experts:
        config = Qwen3MoeConfig(tie_word_embeddings=True, num_experts=experts, **EXPERTS_SHAPE, **sizes)
        model = Qwen3MoeForCausalLM(config)
    else:
        model = Qwen3ForCausalLM(Qwen3Config(tie_word_embeddings=True, **sizes))
    model.generation_config = GenerationConfig.from_dict(ends)
    return model


def batches(stream: torch.Tensor, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Yield batches of windows for ever: each pass cuts the stream at a new offset, in a new order."""
    while True:
        offset = int(torch.randint(CONTEXT, (1,), generator=generator))
        windows = stream[offset:].unfold(0, CONTEXT, CONTEXT)
        order = torch.randperm(len(windows), generator=generator)
        for start in range(0, len(order) - BATCH_SIZE + 1, BATCH_SIZE):
            yield windows[order[start : start + BATCH_SIZE]]


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine from the peak to the final rate."""
    if step < WARMUP_STEPS:
        return PEAK_LR * (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
    return FINAL_LR + (PEAK_LR - FINAL_LR) * 0.5 * (1.0 + math.cos(math.pi * progress))


def train(model: Any, stream: torch.Tensor, steps: int, seed: int) -> float:
    """Train in float32, with weight decay on the matrices only; return the wall time in seconds."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY)
    feed = batches(stream, torch.Generator().manual_seed(seed))
    start, running = time.monotonic(), 0.0
    model.train()
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step - 1, steps)
        batch = next(feed)
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        running += loss.item()
        if step % LOG_EVERY == 0:
            seconds = time.monotonic() - start
            print(f"step {step:5d}/{steps}  loss {running / LOG_EVERY:.4f}  {seconds:6.1f} s", flush=True)
            running = 0.0
    return time.monotonic() - start


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def save_checkpoint(model: Any, tokenizer: Any, directory: Path) -> None:
    """Save BF16 safetensors in two shards, the configuration and the tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(directory, max_shard_size=SHARD_SIZE)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": CONTEXT}
    write_json(directory / "tokenizer_config.json", settings | {"eos_token": END_OF_TEXT, "pad_token": PAD})


@torch.no_grad()
def evaluate(directory: Path, text: str) -> dict[str, Any]:
    """Reload the checkpoint in bfloat16 and measure the perplexity over non-overlapping windows."""
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    model.eval()
    ids = torch.tensor(AutoTokenizer.from_pretrained(directory)(text, verbose=False)["input_ids"])
    windows, loss = ids.unfold(0, CONTEXT, CONTEXT), 0.0
    for window in windows:
        logits = model(input_ids=window[None], use_cache=False).logits[0, :-1].float()
        loss += functional.cross_entropy(logits, window[1:], reduction="sum").item()
    predicted = len(windows) * (CONTEXT - 1)
    counts = {"tokens": len(ids), "windows": len(windows), "predicted_tokens": predicted, "context": CONTEXT}
    return {"perplexity": math.exp(loss / predicted), **counts, "chance": VOCAB_SIZE, "dtype": "bfloat16"}


def cpu_name() -> str:
    """Name the CPU as the operating system does."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def document(directory: Path, excerpts: dict[str, str], facts: dict[str, Any]) -> None:
    """Write the held-out text with its licence, the perplexity on it, and the model card."""
    text = "".join(excerpts.values())
    (directory / "heldout.txt").write_text(text, encoding="utf-8")
    shutil.copyfile(STDLIB / "LICENSE.txt", directory / "heldout.LICENSE.txt")
    result = evaluate(directory, text)
    write_json(directory / "heldout.json", result)
    facts |= {"names": ", ".join(f"`{name}`" for name in excerpts), "python": platform.python_version()}
    facts |= {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": THREADS, "torch": torch.__version__}
    (directory / "README.md").write_text(CARD.format(**facts, **result), encoding="utf-8")
    print(f"saved to {directory}; held-out perplexity {result['perplexity']:.2f}")


def main() -> None:
    """Train, save, evaluate and document the demo model."""
    parser = argparse.ArgumentParser(description="Train the demo model on the Python standard library.")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "demo-qwen3")
    parser.add_argument("--steps", type=int, default=4500, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed (default: %(default)s)")
    parser.add_argument("--experts", type=int, default=0, help="experts of each layer (default: none)")
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    torch.manual_seed(args.seed)
    sources = collect_sources()
    texts = [text for name, text in sources.items() if not is_heldout(name)]
    tokenizer = train_tokenizer(texts)
    stream = encode_corpus(tokenizer, texts)
    model = build_model(tokenizer, args.experts)
    mlp = f"{args.experts} experts of {EXPERTS_SHAPE['moe_intermediate_size']}" if args.experts else "MLP 512"
    facts: dict[str, Any] = {"model": type(model).__name__, "mlp": mlp}
    facts |= {"options": f" --experts {args.experts}" if args.experts else ""}
    facts |= {"parameters": model.num_parameters(), "files": len(texts), "stream": len(stream)}
    facts |= {"seed": args.seed, "steps": args.steps, "batch": BATCH_SIZE}
    facts |= {"seen": args.steps * BATCH_SIZE * CONTEXT}
    print(", ".join(f"{key} {value}" for key, value in facts.items()), flush=True)
    facts["minutes"] = train(model, stream, args.steps, args.seed) / 60
    save_checkpoint(model, tokenizer, args.output)
    document(args.output, heldout_excerpts(sources), facts)
    for path in args.output.iterdir():
        path.chmod(0o644)


if __name__ == "__main__":
    main()
