"""Which inference engine loads what: one file and one value per engine; `judge` applies their rules."""
