"""Time the CPU kernels against torch on one core, and check that both write the same bytes; prints one JSON document.

The torch side is what a careful user of torch would write: BF16 to FP8 in tiles that stay in the cache, with every
intermediate in a buffer that is allocated once. A division by a tensor, not by its reciprocal, gives the same bytes.
"""

import argparse
import json
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fp8pack.numerics.formats import E4M3
from fp8pack.numerics.granularity import parse_granularity
from fp8pack.numerics.native import quantize_rows
from fp8pack.numerics.rounding import ScaleRounding

SHAPE = (2048, 4096)
TILE_NBYTES = 512 << 10  # of float32
GRANULARITIES = ("block:128x128", "channel", "group:64", "mx")
MIN_SCALE = 2.0**-126


def torch_reference(weight: Tensor, region: tuple[int, int], power_of_two: bool) -> Callable[[], tuple[Tensor, Tensor]]:
    """Return a function that quantizes weight [N, K], bfloat16, into buffers of its own: payload [N, K] and scales."""
    (n, k), (rows, cols) = weight.shape, region
    payload, scales = torch.empty(n, k, dtype=torch.float8_e4m3fn), torch.empty(n // rows, k // cols)
    largest = torch.tensor(448.0)
    wide = max(cols, min(k, TILE_NBYTES // (4 * rows) // cols * cols))
    high = max(rows, TILE_NBYTES // (4 * wide) // rows * rows)
    buffer, scratch = torch.empty(high * wide), torch.empty(high * wide)

    def quantize() -> tuple[Tensor, Tensor]:
        for top in range(0, n, high):
            for left in range(0, k, wide):
                part = weight[top : top + high, left : left + wide]
                grid = (part.shape[0] // rows, rows, part.shape[1] // cols, cols)
                x = buffer[: part.numel()].view(part.shape).copy_(part).view(grid)
                q = scratch[: part.numel()].view(grid)
                amax = torch.abs(x, out=q).amax(dim=(1, 3)) if rows > 1 else torch.abs(x, out=q).amax(dim=3)[:, 0]
                scale = _scale_of(amax, largest, power_of_two)
                torch.div(x, scale[:, None, :, None], out=q).clamp_(-448.0, 448.0)
                payload[top : top + high, left : left + wide] = q.view(part.shape).to(torch.float8_e4m3fn)
                first, begin = top // rows, left // cols
                scales[first : first + scale.shape[0], begin : begin + scale.shape[1]] = scale
        return payload, scales

    return quantize


def _scale_of(amax: Tensor, largest: Tensor, power_of_two: bool) -> Tensor:
    scale = (amax / largest).clamp_(min=MIN_SCALE)
    if power_of_two:
        scale = ((scale.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    return torch.where(amax == 0, 1.0, scale)


def compare(name: str, repetitions: int) -> dict[str, object]:
    """Return CPU seconds of both sides for one granularity, alternating; both must write the same bytes."""
    region = parse_granularity(name).region(SHAPE)
    mx = name == "mx"
    values = np.random.default_rng(0).standard_normal(SHAPE, np.float32) * np.float32(0.02)
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    payload, scales = np.empty(SHAPE, np.uint8), np.empty((SHAPE[0] // region[0], SHAPE[1] // region[1]), np.float32)
    rounding = ScaleRounding.UP if mx else ScaleRounding.NONE
    reference = torch_reference(torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16), region, mx)

    def kernel() -> None:
        quantize_rows(bits, payload, scales, dtype="BF16", region=region, format=E4M3, rounding=rounding)

    kernel()
    expected = reference()
    if not (payload == expected[0].view(torch.uint8).numpy()).all() or not (scales == expected[1].numpy()).all():
        raise AssertionError(f"{name}: the kernel and torch differ")
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(repetitions):
        for function, found in zip((kernel, reference), seconds, strict=True):
            begin = time.process_time()
            function()
            found.append(time.process_time() - begin)
    return {"granularity": name, "input_nbytes": bits.nbytes, "kernel": seconds[0], "torch": seconds[1]}


def main() -> None:
    """Compare every granularity and print the seconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps([compare(name, args.repetitions) for name in GRANULARITIES], indent=2))


if __name__ == "__main__":
    main()
