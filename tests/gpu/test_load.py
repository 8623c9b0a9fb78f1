"""Loading to a CUDA device: byte for byte what the files hold, from a cold disk too, and in little host memory."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import verbs
from checkpoints import MakeCheckpoint, llama_config, llama_tensors, random_weight, write_model
from torch import Tensor

import fp8pack
from fp8pack.checkpoint.quantized import read_contents
from fp8pack.checkpoint.source import open_checkpoint
from fp8pack.errors import VerificationError
from fp8pack.numerics.granularity import parse_granularity
from fp8pack.packing.options import WriteOptions
from fp8pack.planning.recipe import Request
from fp8pack.runtime import placement, reader
from fp8pack.runtime.load import fill_buffers
from fp8pack.runtime.packed_checkpoint import PackedCheckpoint

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

DEVICE = "cuda"
GRANULARITIES = ["tensor", "channel", "group:64", "block:128x128", "mx"]
ODD = {
    "model.layers.0.mlp.odd.weight": (131, 77),
    "model.layers.0.mlp.row.weight": (1, 4097),
    "model.layers.1.mlp.column.weight": (257, 1),
}
MIB = 1 << 20
STAGING_NBYTES = 2 * placement.READ_NBYTES  # of each worker


def packed(make: MakeCheckpoint, out: Path, granularity: str = "block:128x128", shards: int = 1) -> Path:
    tensors = llama_tensors() | {name: random_weight(shape, i) for i, (name, shape) in enumerate(ODD.items())}
    asked = Request(granularity=parse_granularity(granularity), quant_method="fp8pack")
    verbs.pack(make(tensors, shards=shards), asked, WriteOptions(out))
    return out


def bytes_of(tensor: Tensor) -> Tensor:
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8)


def assert_same(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """The same names, and under each the same bytes, shapes and types."""
    assert found.keys() == expected.keys()
    for name, known in expected.items():
        other = found[name]
        pairs = [(other, known)]
        if isinstance(known, fp8pack.PackedTensor):
            assert (other.block, other.granularity, other.format) == (known.block, known.granularity, known.format)
            pairs = [(other.qdata, known.qdata), (other.stored_scale, known.stored_scale)]
        for one, two in pairs:
            assert one.device.type == DEVICE
            assert (one.dtype, one.shape) == (two.dtype, two.shape)
            assert torch.equal(bytes_of(one), bytes_of(two)), name


@pytest.mark.parametrize("workers", [1, 7])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_every_byte_is_that_of_the_files(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, granularity: str, shards: int, workers: int
) -> None:
    out = packed(make_checkpoint, tmp_path / "out", granularity, shards)
    assert_same(fp8pack.load_packed(out, DEVICE, workers=workers), fp8pack.load_packed(out))


@pytest.mark.parametrize("read_nbytes", [4096, 5000, 1 << 16])
def test_many_reads_share_the_staging_buffers(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, read_nbytes: int
) -> None:
    source = open_checkpoint(packed(make_checkpoint, tmp_path / "out", shards=2))
    contents, device = read_contents(source), torch.device(DEVICE)
    memory = fill_buffers(source.directory, contents, {}, {}, device=device, workers=3, read_nbytes=read_nbytes)
    found = PackedCheckpoint(source, contents, memory, {}, tuple(contents.quantized))
    assert_same(found, fp8pack.load_packed(source.path))


def test_a_selection_is_loaded_alone(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    out, wanted = packed(make_checkpoint, tmp_path / "out", shards=2), ["*.mlp.odd", "*.self_attn.q_proj", "model.norm"]
    found = fp8pack.load_packed(out, DEVICE, tensors=wanted)
    assert len(found) == 4
    assert_same(found, fp8pack.load_packed(out, tensors=wanted))


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("world", [2, 4])
def test_each_rank_has_its_part(make_checkpoint: MakeCheckpoint, tmp_path: Path, world: int, verify: bool) -> None:
    fp8pack.pack(make_checkpoint(shards=2), tmp_path / "out", scheme="FP8_DYNAMIC")
    for rank in range(world):
        found = fp8pack.load_packed(tmp_path / "out", DEVICE, tp=(rank, world), verify=verify)
        assert_same(found, fp8pack.load_packed(tmp_path / "out", tp=(rank, world)))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_what_is_verified_is_what_is_loaded(make_checkpoint: MakeCheckpoint, tmp_path: Path, granularity: str) -> None:
    out = packed(make_checkpoint, tmp_path / "out", granularity, shards=2)
    assert_same(fp8pack.load_packed(out, DEVICE, verify=True), fp8pack.load_packed(out))
    file = sorted(out.glob("*.safetensors"))[0]
    with file.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        last = stream.read(1)[0]
        stream.seek(-1, os.SEEK_END)
        stream.write(bytes([last ^ 1]))
    with pytest.raises(VerificationError, match=file.name):
        fp8pack.load_packed(out, DEVICE, verify=True)


def test_fused_weights_are_views_on_the_device(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    loaded = fp8pack.load_packed(packed(make_checkpoint, tmp_path / "out"), DEVICE)
    fused, first = loaded.fused("model.layers.0.mlp.gate_up_proj"), loaded["model.layers.0.mlp.gate_proj.weight"]
    assert isinstance(first, fp8pack.PackedTensor)
    assert fused.qdata.data_ptr() == first.qdata.data_ptr()
    assert first.qdata.data_ptr() % 16 == 0


def forget(folder: Path) -> None:
    """Let the page cache forget every shard; what is dirty is written out before."""
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def evict(folder: Path) -> bool:
    """Let the page cache forget every shard, and say whether it did."""
    for _ in range(5):  # a page that the kernel has in hand at the moment stays
        forget(folder)
        if all(reader._is_cold(file) for file in folder.glob("*.safetensors")):
            forget(folder)  # asking can bring pages back
            return True
    return False


@pytest.mark.parametrize("verify", [False, True])
def test_a_cold_file_is_read_past_the_page_cache(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verify: bool
) -> None:
    out = packed(make_checkpoint, tmp_path / "out", shards=2)
    read: list[int] = []
    pages = reader._DirectReader._read_pages

    def spy(self: Any, buffer: memoryview, offset: int) -> int:
        read.append(pages(self, buffer, offset))
        return read[-1]

    monkeypatch.setattr(reader._DirectReader, "_read_pages", spy)
    if not evict(out):  # before anything maps them: mapped pages stay
        pytest.skip(f"{tmp_path} keeps its files in the page cache, or does not read past it")
    found = fp8pack.load_packed(out, DEVICE, verify=verify)
    assert sum(read) > 0
    assert_same(found, fp8pack.load_packed(out))


def peak_of_resident_set(*, reset: bool = False) -> int:
    """The largest resident set since the last reset, in bytes."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))


def large_model(folder: Path) -> Path:
    """1 GiB of BF16 in 8 matrices over 2 shards, which packs to 512 MiB."""
    shape, noise = (8192, 8192), random_weight((1024, 8192), 1).view(np.uint16)
    weight = np.tile(noise, (8, 1)).view(ml_dtypes.bfloat16)
    assert weight.shape == shape
    tensors = {f"model.layers.{i}.mlp.up_proj.weight": weight for i in range(8)}
    return write_model(folder, tensors, llama_config(layers=8), shards=2)


@pytest.mark.slow
@pytest.mark.parametrize("cold", [False, True], ids=["warm", "cold"])
def test_half_a_gibibyte_passes_through_little_host_memory(tmp_path: Path, cold: bool) -> None:
    out, workers = tmp_path / "out", 2
    fp8pack.pack(large_model(tmp_path / "model"), out, scheme="FP8_BLOCK")
    fp8pack.load_packed(out, DEVICE, workers=workers, tensors=["model.layers.0.mlp.up_proj"])  # CUDA and its buffers
    if cold and not evict(out):
        pytest.skip(f"{tmp_path} keeps its files in the page cache, or does not read past it")
    before = peak_of_resident_set(reset=True)
    loaded = fp8pack.load_packed(out, DEVICE, workers=workers)
    assert sum(tensor.qdata.nbytes for tensor in loaded.values()) >= 512 * MIB
    assert peak_of_resident_set() - before <= workers * STAGING_NBYTES + 32 * MIB
