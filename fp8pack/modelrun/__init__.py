"""Transformers models of checkpoints, built without weights, and their parameter names in memory."""
