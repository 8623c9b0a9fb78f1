"""Granularity: the region of a weight that shares one scale."""

import re
from dataclasses import dataclass
from functools import lru_cache

from fp8pack.inputs import unknown
from fp8pack.units import ceil_div


@dataclass(frozen=True, slots=True)
class Granularity:
    """A region of `rows` x `cols` elements of a weight [N, K]; None is the whole axis.

    `tensor` is (None, None), `channel` (1, None), `group:G` (1, G), `block:RxC` (R, C), `mx` (1, 32).
    """

    name: str
    rows: int | None
    cols: int | None

    def __str__(self) -> str:
        return self.name

    def region(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Return the rows and columns of one full region of a weight of this shape, at least 1 of each."""
        n, k = shape
        return (max(1, n) if self.rows is None else self.rows), (max(1, k) if self.cols is None else self.cols)

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Return the grid of scales of a weight [N, K]; a ragged edge counts as a whole region."""
        return _grid(*shape, *self.region(shape))

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Say whether the regions tile a weight of this shape without a ragged edge."""
        n, k = shape
        rows, cols = self.region(shape)
        return n % rows == 0 and k % cols == 0


@lru_cache(maxsize=1024)
def _grid(n: int, k: int, rows: int, cols: int) -> tuple[int, int]:
    return ceil_div(n, rows), ceil_div(k, cols)


TENSOR = Granularity("tensor", None, None)
CHANNEL = Granularity("channel", 1, None)
MX = Granularity("mx", 1, 32)
BLOCK_128 = Granularity("block:128x128", 128, 128)


@lru_cache(maxsize=256)
def parse_granularity(text: str) -> Granularity:
    """Return the granularity of `tensor`, `channel`, `group:64`, `block:128x128` or `mx`."""
    name = text.lower().replace("_", "-").removeprefix("per-")
    for fixed in (TENSOR, CHANNEL, MX):
        if name == fixed.name:
            return fixed
    if match := re.fullmatch(r"group:([1-9]\d{0,8})", name):
        return Granularity(name, 1, int(match[1]))
    if match := re.fullmatch(r"block:([1-9]\d{0,4})x([1-9]\d{0,8})", name):
        return Granularity(name, int(match[1]), int(match[2]))
    if name == "block":
        return BLOCK_128
    raise unknown("granularity", text, ("tensor", "channel", "group:64", "block:128x128", "mx"))
