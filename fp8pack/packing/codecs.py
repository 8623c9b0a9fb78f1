"""Rows of raw weight bits in, FP8 bytes and scales out: by the CPU kernels, or by torch on a device; the same bytes."""

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fp8pack.numerics import native
from fp8pack.planning.plan import Packing

Array = NDArray[Any]
BITS_DTYPE: dict[str, np.dtype[Any]] = {
    "BF16": np.dtype(np.uint16),
    "F16": np.dtype(np.uint16),
    "F32": np.dtype(np.uint32),
}


class Codec(Protocol):
    """Quantizes whole rows of regions; weights are raw bits, uint16 for BF16 and F16, uint32 for F32."""

    strip_nbytes: int

    def amax(self, weight: Array, dtype: str) -> float:
        """Return the largest magnitude, NaN if the weight holds a NaN or infinity."""
        ...

    def quantize(self, weight: Array, payload: Array, scales: Array, *, dtype: str, packing: Packing) -> float:
        """Fill payload [N, K] and, unless the packing is two-pass, scales; return amax as above."""
        ...


def make_codec(device: str, strip_nbytes: int | None = None) -> Codec:
    """Return the codec of a device: `cpu` is the CPU kernels, `cuda` and `cuda:1` torch there, `torch:cpu` torch here.

    strip_nbytes: by default what suits the device.
    Raises:
        DeviceError: torch sees none here.
    """
    return CpuCodec(strip_nbytes) if device == "cpu" else TorchCodec(device, strip_nbytes)


class CpuCodec:
    """The CPU kernels. A strip is what is read, quantized and written at a time: it stays in the cache."""

    def __init__(self, strip_nbytes: int | None = None) -> None:
        self.strip_nbytes = 2 << 20 if strip_nbytes is None else strip_nbytes

    def amax(self, weight: Array, dtype: str) -> float:
        """See Codec."""
        return native.amax_rows(weight, dtype=dtype)

    def quantize(self, weight: Array, payload: Array, scales: Array, *, dtype: str, packing: Packing) -> float:
        """See Codec."""
        region = packing.granularity.region(weight.shape)
        rounding = None if packing.two_pass else packing.rounding
        return native.quantize_rows(
            weight, payload, scales, dtype=dtype, region=region, format=packing.format, rounding=rounding
        )


class TorchCodec:
    """The torch reference on a device; strips are as large as bands, to keep a GPU busy."""

    def __init__(self, device: str, strip_nbytes: int | None = None) -> None:
        import torch  # heavy, and never needed to pack on a CPU

        from fp8pack.gemm.device import find_device
        from fp8pack.numerics import torch_codec

        self.strip_nbytes = 8 << 20 if strip_nbytes is None else strip_nbytes
        self._torch, self._codec = torch, torch_codec
        self._device = find_device(device.removeprefix("torch:"))
        self._dtypes = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}

    def amax(self, weight: Array, dtype: str) -> float:
        """See Codec."""
        amax = self._upload(weight, dtype).float().abs().amax()
        return float(amax) if self._torch.isfinite(amax) else float("nan")

    def quantize(self, weight: Array, payload: Array, scales: Array, *, dtype: str, packing: Packing) -> float:
        """See Codec."""
        uploaded = self._upload(weight, dtype)
        amax = float(uploaded.float().abs().amax())
        if not np.isfinite(amax):
            return float("nan")
        given = self._torch.from_numpy(scales).to(self._device) if packing.two_pass else None
        region = packing.granularity.region(weight.shape)
        codes, found = self._codec.quantize(
            uploaded, region, format=packing.format, rounding=packing.rounding, scales=given
        )
        payload[...] = codes.view(self._torch.uint8).cpu().numpy()
        scales[...] = found.cpu().numpy()
        return amax

    def _upload(self, weight: Array, dtype: str) -> Any:
        signed = weight.view(f"i{weight.dtype.itemsize}")
        return self._torch.from_numpy(signed).to(self._device).view(self._dtypes[dtype])
