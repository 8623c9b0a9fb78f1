"""Calibration: BF16 runs of a model over prompts, and the statistics of its activations."""
