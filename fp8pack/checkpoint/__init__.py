"""Files: reading and writing safetensors checkpoints, and the conventions that engines read."""
