"""The scales of an output that were those of the source: cut into finer regions, and encoded as they are stored."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fp8pack.checkpoint.scales import Span
from fp8pack.errors import InputError
from fp8pack.modelfacts.contents import Quantized
from fp8pack.modelfacts.spec import TensorSpec
from fp8pack.numerics.scaling import decode_e8m0, encode_e8m0
from fp8pack.numerics.swizzle import swizzle
from fp8pack.planning.plan import Packing
from fp8pack.units import ceil_div


def refine(
    scales: NDArray[np.float32], spec: TensorSpec, quantized: Quantized, packing: Packing, *, rows: Span, cols: Span
) -> NDArray[np.float32]:
    """Return scales, as `read_scales` gives them for these rows and columns, for the regions of a finer packing.

    Raises:
        InputError: a scale is zero, which no convention allows.
    """
    if not scales.all():
        name = quantized.scale.name if quantized.scale else spec.name
        raise InputError(f"{spec.file}: {name!r} contains a scale of zero", "`fp8pack unpack` it, then pack")
    theirs, ours = quantized.granularity.region(spec.matrix), packing.granularity.region(spec.matrix)
    picks = []
    for axis, (begin, end) in enumerate((rows, cols)):
        starts = np.arange(begin // ours[axis], ceil_div(end, ours[axis])) * ours[axis]
        picks.append(starts // theirs[axis] - begin // theirs[axis])
    return np.ascontiguousarray(scales[np.ix_(*picks)])


def encode_scales(scales: NDArray[np.float32], packing: Packing) -> NDArray[Any]:
    """Return scales as they are stored: float32, or exponents, which may lie in tiles.

    Raises:
        InputError: exponents are asked for and a scale is no power of two.
    """
    if packing.scale.dtype != "U8":
        return scales
    exponents = encode_e8m0(scales)
    if not np.array_equal(decode_e8m0(exponents), scales):
        raise InputError(
            f"{packing.scale.name}: the source declares scales that are powers of two, and has others",
            "`fp8pack unpack` it, then pack",
        )
    return swizzle(exponents) if packing.tiled else exponents
