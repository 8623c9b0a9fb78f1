"""For inference: packed tensors on a device, FP8 linear layers and models."""
