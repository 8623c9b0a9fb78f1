"""How work is cut."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sizes:
    """How work is cut, in bytes of source; only tests have others than SIZES.

    band: about as much is worked, digested and resumed together; the band of a copy is part of the format.
    granule: rows of one scale region above this are cut into columns. strip: what of a band is worked at a time; None
    is the codec's own. checkpoint: what a killed run may have to do again, of each shard.
    """

    band: int = 8 << 20
    granule: int = 16 << 20
    strip: int | None = None
    checkpoint: int = 1 << 30


SIZES = Sizes()
