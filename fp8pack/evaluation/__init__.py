"""What quantization cost a model: `evaluate`."""
