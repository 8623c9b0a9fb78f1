"""The bytes of the demo model under every scheme: a change here is a change of the format or of the numerics.

`make golden` writes the file anew; the commit that does so says why.
"""

import json
from pathlib import Path

import pytest
import verbs
from checkpoints import DEMO

from fp8pack.numerics.formats import parse_format
from fp8pack.numerics.granularity import parse_granularity
from fp8pack.packing.options import WriteOptions
from fp8pack.planning.recipe import Request

GOLDEN = Path(__file__).with_name("golden.json")
REQUESTS = {
    "auto": Request(),
    "FP8_BLOCK": Request(scheme="FP8_BLOCK"),
    "FP8_DYNAMIC": Request(scheme="FP8_DYNAMIC"),
    "MXFP8": Request(scheme="MXFP8"),
    "W8A16": Request(scheme="W8A16"),
    "tensor": Request(granularity=parse_granularity("tensor")),
    "group:64": Request(granularity=parse_granularity("group:64")),
    "e5m2 channel": Request(format=parse_format("e5m2"), granularity=parse_granularity("channel")),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_the_demo_model_packs_to_the_same_root_as_ever(name: str, tmp_path: Path) -> None:
    root = verbs.pack(DEMO, REQUESTS[name], WriteOptions(tmp_path / "out")).root
    assert root == json.loads(GOLDEN.read_text())[name]


def write_golden(folder: Path) -> None:
    """Pack the demo model under every scheme and record the roots."""
    outputs = enumerate(REQUESTS.items())
    roots = {name: verbs.pack(DEMO, asked, WriteOptions(folder / str(i))).root for i, (name, asked) in outputs}
    GOLDEN.write_text(json.dumps(roots, indent=2) + "\n")
