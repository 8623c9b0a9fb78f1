"""FP8 matrix products on a device: activations are quantized, products accumulated in float32. Knows no files."""
