"""Quantize a checkpoint with llm-compressor's model_free_ptq; runs in the environment that bench.py makes for it.

python peer_llmcompressor.py SOURCE OUTPUT WORKERS
"""

import sys

from llmcompressor import model_free_ptq

IGNORE = ["lm_head", "re:.*embed_tokens.*", "re:.*norm.*"]  # leaves the same tensors as fp8pack's policy does


def main() -> None:
    """Read the arguments and quantize."""
    source, output, workers = sys.argv[1:]
    model_free_ptq(source, output, scheme="FP8_BLOCK", ignore=IGNORE, max_workers=int(workers), device="cpu")


if __name__ == "__main__":
    main()
