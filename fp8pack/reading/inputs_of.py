"""What a calibration knows of the inputs of linears: enough to predict what their outputs lose."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fp8pack.checkpoint.calibration_file import read_calibration
from fp8pack.checkpoint.source import Source
from fp8pack.errors import InputError
from fp8pack.numerics import native
from fp8pack.numerics.formats import E4M3
from fp8pack.numerics.metrics import OutputTally
from fp8pack.planning.calibration import Calibration, Site, value_of, values_of


class Inputs:
    """Statistics of inputs, by the name of the weight."""

    def __init__(self, calibration: Calibration) -> None:
        self._sites: Mapping[str, Site] = calibration.by_point

    def site_of(self, weight: str) -> Site | None:
        """Return the statistics of a weight's input; None if the calibration did not see it."""
        site = self._sites.get(f"{weight.removesuffix('.weight')}.input")
        return site if site is not None and site.tokens else None

    def tally_of(self, weight: str, activations: str) -> OutputTally | None:
        """Return a tally of a weight's output; activations: none, dynamic or static."""
        site = self.site_of(weight)
        if site is None:
            return None
        rounding = 0.0 if activations == "none" else rounding_of(site, static=activations == "static")
        return OutputTally(site.channel_squares / site.tokens, rounding)


def read_inputs(path: Path, source: Source) -> Inputs:
    """Return the statistics of a calibration; InputError if it is malformed, or of another model than the source."""
    calibration = read_calibration(path)
    if calibration.fingerprint and calibration.fingerprint != source.fingerprint:
        raise InputError(f"{path} is of another model than {source.path}", "calibrate this one")
    return Inputs(calibration)


def rounding_of(site: Site, *, static: bool) -> float:
    """Return the energy that rounding to E4M3 adds to inputs, relative to theirs.

    static: one scale, of the largest magnitude; else that of a prompt with the mean amax, which stands for a token.
    """
    magnitudes = values_of(site.bins)
    energy = float((magnitudes.astype(np.float64) ** 2) @ site.counts)
    if not energy:
        return 0.0
    seen = [value_of(int(amax)) for amax in site.prompt_amax if amax]
    amax = site.amax if static or not seen else sum(seen) / len(seen)
    scales = np.full((1, 1), max(amax / E4M3.max, 2.0**-126), np.float32)
    payload, values = np.empty((1, magnitudes.size), np.uint8), np.empty((1, magnitudes.size), np.uint32)
    bits, region = magnitudes.reshape(1, -1).view(np.uint32), (1, magnitudes.size)
    if not static:  # a larger token has a larger scale of its own
        bits = np.minimum(magnitudes, np.float32(amax)).reshape(1, -1).view(np.uint32)
    native.quantize_rows(bits, payload, scales, dtype="F32", region=region, format=E4M3, rounding=None)
    native.dequantize_rows(payload, scales, values, region=region, format=E4M3)
    error = bits.view(np.float32)[0].astype(np.float64) - values.view(np.float32)[0]
    return float((error**2) @ site.counts) / energy
