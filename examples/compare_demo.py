"""Compare a packed demo model with its BF16 source: perplexity on the held-out text.

python examples/compare_demo.py demo-output
"""

import argparse
import json
import math
import warnings
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import fp8pack

DEMO = Path(__file__).parent / "demo-qwen3"


def perplexity(model: torch.nn.Module, tokens: torch.Tensor, context: int) -> float:
    """Return the perplexity over whole windows of `context` tokens; the first of each is not predicted."""
    windows = tokens[: len(tokens) // context * context].view(-1, context)
    with torch.no_grad():
        logits = torch.cat([model(window[None]).logits for window in windows]).float()
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
    return math.exp(loss.item())


def main() -> None:
    """Load the source, measure, put in the dequantized weights, measure again."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("packed", type=Path)
    packed = fp8pack.load_packed(parser.parse_args().packed)
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    context = json.loads((DEMO / "heldout.json").read_text())["context"]
    tokens = AutoTokenizer.from_pretrained(DEMO)((DEMO / "heldout.txt").read_text(), return_tensors="pt").input_ids[0]
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.bfloat16)
    before = perplexity(model, tokens, context)
    for name, tensor in packed.items():
        if isinstance(tensor, fp8pack.PackedTensor):
            model.get_parameter(name).data.copy_(tensor.dequantize())
    after = perplexity(model, tokens, context)
    print(f"held-out perplexity  BF16 {before:.2f}  FP8 weights {after:.2f}  ({after / before - 1:+.2%})")


if __name__ == "__main__":
    main()
