"""Metrics as text."""

from fp8pack.numerics.metrics import EXACT_DB, LOST_DB


def decibels(sqnr: float, digits: int = 1) -> str:
    """Return an SQNR: `exact` where nothing differs, `lost` where nothing is left."""
    return "exact" if sqnr >= EXACT_DB else "lost" if sqnr <= LOST_DB else f"{sqnr:.{digits}f}"


def share(value: float | None) -> str:
    """Return a share in percent, `0` where there is none, empty where it is not known."""
    if value is None:
        return ""
    return "0" if value == 0 else f"{value:.2%}" if value >= 1e-4 else f"{value:.1e}"
