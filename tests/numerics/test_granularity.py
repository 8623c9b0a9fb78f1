import pytest

from fp8pack.errors import RecipeError
from fp8pack.numerics.granularity import parse_granularity


@pytest.mark.parametrize(
    ("text", "region", "grid"),
    [
        ("tensor", (300, 200), (1, 1)),
        ("channel", (1, 200), (300, 1)),
        ("per_channel", (1, 200), (300, 1)),
        ("group:64", (1, 64), (300, 4)),
        ("block:128x128", (128, 128), (3, 2)),
        ("block", (128, 128), (3, 2)),
        ("mx", (1, 32), (300, 7)),
    ],
)
def test_a_ragged_edge_counts_as_a_region(text: str, region: tuple[int, int], grid: tuple[int, int]) -> None:
    granularity = parse_granularity(text)
    assert granularity.region((300, 200)) == region
    assert granularity.scale_shape((300, 200)) == grid


@pytest.mark.parametrize("text", ["group:0", "group", "block:128", "block:0x128", "row", "group:-1", "block:1x1x1", ""])
def test_what_is_no_granularity_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="granularity"):
        parse_granularity(text)
