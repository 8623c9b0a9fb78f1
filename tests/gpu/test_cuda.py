"""On a CUDA device: the same bytes, and the same tensors."""

from pathlib import Path

import pytest
import torch
import verbs
from checkpoints import MakeCheckpoint, llama_tensors, random_weight

import fp8pack
from fp8pack.numerics.formats import FORMATS, Float8Format
from fp8pack.numerics.granularity import parse_granularity
from fp8pack.packing.options import WriteOptions
from fp8pack.planning.recipe import Request

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group:64", "block:128x128", "mx"])
@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
def test_the_device_writes_the_bytes_of_the_cpu(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, format: Float8Format, granularity: str
) -> None:
    source = make_checkpoint(llama_tensors() | {"model.layers.0.mlp.odd.weight": random_weight((700, 130), 5)})
    asked = Request(format=format, granularity=parse_granularity(granularity), quant_method="fp8pack")
    roots = [verbs.pack(source, asked, WriteOptions(tmp_path / d, device=d)).root for d in ("cpu", "cuda")]
    assert roots[0] == roots[1]


def test_loading_to_the_device_equals_loading_to_the_cpu(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    fp8pack.pack(make_checkpoint(shards=2), tmp_path / "out")
    on_cpu, on_device = fp8pack.load_packed(tmp_path / "out"), fp8pack.load_packed(tmp_path / "out", device="cuda")
    for name, expected in on_cpu.items():
        found = on_device[name]
        if isinstance(expected, fp8pack.PackedTensor):
            assert isinstance(found, fp8pack.PackedTensor)
            assert torch.equal(found.qdata.cpu().view(torch.uint8), expected.qdata.view(torch.uint8))
            assert torch.equal(found.dequantize().cpu(), expected.dequantize())
        else:
            assert isinstance(found, torch.Tensor)
            assert torch.equal(found.cpu(), expected)
