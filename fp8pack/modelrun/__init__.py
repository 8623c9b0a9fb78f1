"""Models of transformers for a checkpoint, built without weights; and the names that they have in memory."""
