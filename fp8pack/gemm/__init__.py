"""FP8 GEMMs on a device: activations are quantized, sums accumulated in float32. Reads no files."""
