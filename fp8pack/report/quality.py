"""SQNR as text."""

from fp8pack.numerics.metrics import EXACT_DB, LOST_DB


def decibels(sqnr: float, digits: int = 1) -> str:
    """Return an SQNR: `exact` where nothing differs, `lost` where a NaN, infinity or zero is against a value."""
    return "exact" if sqnr >= EXACT_DB else "lost" if sqnr <= LOST_DB else f"{sqnr:.{digits}f}"
