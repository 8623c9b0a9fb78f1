"""Which inference engine loads what: one file an engine, each one value, and `judge` which asks them."""
