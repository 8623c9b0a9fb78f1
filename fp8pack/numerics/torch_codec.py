"""The reference codec in torch: the same bytes as the CPU kernels, on any device.

Legend: weight [N, K]; a region is R x C elements; tiles [ceil(N/R), R, ceil(K/C), C]; scales [ceil(N/R), ceil(K/C)].
Both operands of a division are tensors of the device: torch turns a division by a Python number on a GPU into a
multiplication with its reciprocal, which gives another result for half of all floats. The cast never sees a value
beyond the format's range, because what it does there changed between torch releases
(tests/numerics/test_torch_codec.py).
"""

import torch
from torch import Tensor

from fp8pack.numerics.formats import Float8Format
from fp8pack.numerics.rounding import ScaleRounding
from fp8pack.numerics.scaling import MIN_SCALE


def quantize(
    weight: Tensor,
    region: tuple[int, int],
    *,
    format: Float8Format,
    rounding: ScaleRounding = ScaleRounding.NONE,
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the FP8 payload of a weight and the scales that dequantize it.

    Shapes: weight [N, K] bfloat16, float16 or float32; payload [N, K] of the format's dtype;
        scales [ceil(N/R), ceil(K/C)] float32, computed unless given. A ragged edge is a region of its own.
    Numerics: scale = max(amax / max, 2^-126), 1.0 for zeros; payload = RNE(clamp(weight / scale, +-max)); float32.
    Raises:
        ValueError: weight is not 2-D, or holds a NaN or infinity.
    """
    if weight.ndim != 2:
        raise ValueError(f"weight has {weight.ndim} dimensions, not 2")
    if not torch.isfinite(weight).all():
        raise ValueError("weight holds a NaN or infinity")
    return quantize_unchecked(weight, region, format=format, rounding=rounding, scales=scales)


def quantize_unchecked(
    x: Tensor,
    region: tuple[int, int],
    *,
    format: Float8Format,
    rounding: ScaleRounding = ScaleRounding.NONE,
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return what `quantize` does, without waiting for the device; where x is not finite, the values are NaN."""
    tiles = _tiles(x.float(), region)
    if scales is None:
        scales = scales_of(tiles.abs().amax(dim=(1, 3)), format, rounding)
    largest = torch.tensor(format.max, device=x.device)
    quotient = (tiles / scales[:, None, :, None]).clamp(-largest, largest)
    quotient = torch.where(torch.isfinite(tiles), quotient, torch.nan)
    payload = quotient.to(getattr(torch, format.torch_dtype)).reshape(tiles.shape[0] * tiles.shape[1], -1)
    return payload[: x.shape[0], : x.shape[1]].contiguous(), scales


def scales_of(amax: Tensor, format: Float8Format, rounding: ScaleRounding) -> Tensor:
    """Return the scales, float32, of regions with these amax values, float32; same shape and device.

    That of a region which holds a NaN or infinity is NaN.
    """
    largest = torch.tensor(format.max, device=amax.device)
    scales = (amax / largest).clamp(min=MIN_SCALE)
    match rounding:
        case ScaleRounding.NONE:
            pass
        case ScaleRounding.UP:
            scales = ((scales.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
        case ScaleRounding.FLOOR:
            exponent = (amax.view(torch.int32) >> 23) - format.emax
            scales = (exponent.clamp(min=1) << 23).view(torch.float32)
    scales = torch.where(amax == 0, torch.ones_like(amax), scales)
    return torch.where(torch.isfinite(amax), scales, torch.full_like(amax, torch.nan))


def as_fnuz(payload: Tensor) -> Tensor:
    """Return E4M3 bytes as E4M3 FNUZ, in place: the same bits mean half the value, and minus zero is a NaN there."""
    codes = payload.view(torch.uint8)
    codes.masked_fill_(codes == 0x80, 0)
    return payload.view(torch.float8_e4m3fnuz)


def dequantize(payload: Tensor, scales: Tensor, region: tuple[int, int]) -> Tensor:
    """Return payload * scale as float32 [N, K]; payload [N, K] FP8, scales [ceil(N/R), ceil(K/C)] float32."""
    tiles = _tiles(payload.float(), region)
    weight = (tiles * scales[:, None, :, None]).reshape(tiles.shape[0] * tiles.shape[1], -1)
    return weight[: payload.shape[0], : payload.shape[1]].contiguous()


def _tiles(weight: Tensor, region: tuple[int, int]) -> Tensor:
    n, k = weight.shape
    rows, cols = min(region[0], n), min(region[1], k)  # a region larger than the weight is the weight
    padded = torch.nn.functional.pad(weight, (0, -k % cols, 0, -n % rows))
    return padded.view(padded.shape[0] // rows, rows, padded.shape[1] // cols, cols)
