"""Which weights [N, K] FP8 kernels support with scales of a granularity."""

from fp8pack.modelfacts.tensor_parallel import GEMM_MULTIPLE
from fp8pack.numerics.granularity import CHANNEL, TENSOR, Granularity


def shape_problem(shape: tuple[int, ...], granularity: Granularity) -> str | None:
    """Return why a weight cannot be FP8: a scale region beyond its edge, or dimensions that no FP8 GEMM supports."""
    n, k = shape
    if granularity not in (TENSOR, CHANNEL) and not granularity.fits(shape):
        if granularity.rows == 1:
            return f"K = {k} is not a multiple of {granularity.cols}"
        return f"{n} x {k} is not a multiple of {granularity.rows}: --scheme FP8_DYNAMIC packs it"
    if n % GEMM_MULTIPLE or k % GEMM_MULTIPLE:
        return f"{n} x {k} is not a multiple of {GEMM_MULTIPLE}: no FP8 GEMM supports it"
    return None
