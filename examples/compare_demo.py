"""Compare a packed demo model with its BF16 source: perplexity over the held-out documents.

Weights are dequantized; activations, where the packed model has static scales for them, are rounded to FP8 as an FP8
GEMM would (fp8pack.numerics.simulate). The interval is a bootstrap over documents.

python examples/compare_demo.py demo-output
"""

import argparse
import json
import math
import warnings
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import fp8pack
from fp8pack.numerics.simulate import Dynamic, Static, simulated

DEMO = Path(__file__).parent / "demo-qwen3"
BEGINS = (0, 3988, 7976, 10451, 12998, 16983, 17754, 21746, 25718)  # of the nine files that heldout.txt is made of
RESAMPLES = 10_000


def read_documents() -> tuple[list[torch.Tensor], int]:
    """Return the token ids of each held-out document, and the context length."""
    facts, text = json.loads((DEMO / "heldout.json").read_text()), (DEMO / "heldout.txt").read_text()
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    bounds = [*BEGINS, len(text)]
    return [tokenizer(text[a:b], return_tensors="pt").input_ids[0] for a, b in pairwise(bounds)], facts["context"]


def losses(model: torch.nn.Module, documents: list[torch.Tensor], context: int) -> np.ndarray:
    """Return [documents, 2]: the summed loss of each, in nats, and how many tokens were predicted."""
    found = []
    with torch.no_grad():
        for ids in documents:
            loss, predicted = 0.0, 0
            for window in ids.split(context):
                logits = model(window[None]).logits[0, :-1].float()
                loss += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
                predicted += len(window) - 1
            found.append((loss, predicted))
    return np.array(found)


def compare(before: np.ndarray, after: np.ndarray) -> str:
    """Return the perplexity after, and its ratio to the one before with a 95 % interval over documents."""
    picks = np.random.default_rng(0).integers(0, len(before), (RESAMPLES, len(before)))
    tokens = before[:, 1][picks].sum(1)
    ratios = np.exp((after[:, 0] - before[:, 0])[picks].sum(1) / tokens)
    low, high = np.percentile(ratios, (2.5, 97.5))
    total = before[:, 1].sum()
    ratio = math.exp((after[:, 0] - before[:, 0]).sum() / total)
    return f"{math.exp(after[:, 0].sum() / total):.2f}   / BF16 {ratio:.4f}   95 % {low:.4f} to {high:.4f}"


def main() -> None:
    """Load the source, measure, put in the dequantized weights, measure again with rounded activations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packed", type=Path)
    packed = fp8pack.load_packed(parser.parse_args().packed)
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    documents, context = read_documents()
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.bfloat16)
    before = losses(model, documents, context)
    weights = {name: tensor for name, tensor in packed.items() if isinstance(tensor, fp8pack.PackedTensor)}
    for name, tensor in weights.items():
        model.get_parameter(name).data.copy_(tensor.dequantize())
    print(f"held-out perplexity  {len(documents)} documents, {int(before[:, 1].sum())} tokens")
    print(f"BF16                   {math.exp(before[:, 0].sum() / before[:, 1].sum()):.2f}")
    print(f"FP8 weights            {compare(before, losses(model, documents, context))}")
    schemes = {"+ dynamic activations": lambda tensor: Dynamic()}
    if all(tensor.input_scale is not None for tensor in weights.values()):
        schemes["+ static activations"] = lambda tensor: Static(float(tensor.input_scale))
    for label, scheme in schemes.items():
        linears = {
            name.removesuffix(".weight"): (tensor.dequantize(torch.float32), scheme(tensor))
            for name, tensor in weights.items()
        }
        with simulated(model, linears):
            print(f"{label:23}{compare(before, losses(model, documents, context))}")


if __name__ == "__main__":
    main()
