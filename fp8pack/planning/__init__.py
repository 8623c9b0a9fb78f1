"""Every decision about a checkpoint, as values: from its headers and a request to a plan. No tensor byte is read."""
