"""Quantize a model with llm-compressor's oneshot; runs in an environment of its own.

python peer_oneshot.py SOURCE OUTPUT FP8|FP8_DYNAMIC QuantizationModifier|GPTQModifier PROMPTS.jsonl MAX_LENGTH
"""

import json
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers import quantization
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Read the arguments, quantize, and print the seconds of oneshot alone."""
    source, output, scheme, modifier, prompts, length = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(source)
    texts = dict.fromkeys(json.loads(line)["text"] for line in Path(prompts).read_text().splitlines())
    rows = [tokenizer(text, truncation=True, max_length=int(length)) for text in texts]
    data = Dataset.from_list([{"input_ids": row["input_ids"], "attention_mask": row["attention_mask"]} for row in rows])
    started = time.monotonic()
    recipe = getattr(quantization, modifier)(targets="Linear", scheme=scheme, ignore=["lm_head", "re:.*mlp.gate$"])
    oneshot(model=model, dataset=data, recipe=recipe, num_calibration_samples=len(rows), max_seq_length=int(length))
    print(f"seconds {time.monotonic() - started:.2f}")
    model.save_pretrained(output, save_compressed=True)
    tokenizer.save_pretrained(output)


if __name__ == "__main__":
    main()
