"""Loading into buffers, as for a GPU, held against the mapped files; selection, parts, digests."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import verbs
from checkpoints import MakeCheckpoint, llama_tensors, random_weight

import fp8pack
from fp8pack.checkpoint.quantized import read_contents
from fp8pack.checkpoint.source import open_checkpoint
from fp8pack.errors import DeviceError, InputError, RecipeError, VerificationError
from fp8pack.gemm.device import DeviceFacts
from fp8pack.numerics.granularity import parse_granularity
from fp8pack.packing.options import WriteOptions
from fp8pack.planning.recipe import Request
from fp8pack.planning.sizes import Sizes
from fp8pack.runtime import load, packed_checkpoint, placement, reader
from fp8pack.runtime.packed_checkpoint import PackedCheckpoint

CPU = torch.device("cpu")
UP = "model.layers.0.mlp.up_proj.weight"
GRANULARITIES = ["tensor", "channel", "group:64", "block:128x128", "mx"]


def packed(make: MakeCheckpoint, out: Path, granularity: str = "block:128x128", **options: Any) -> Path:
    tensors = options.pop("tensors", None)
    source = make(tensors, **options) if tensors else make(**options)
    fp8pack.pack(source, out, granularity=parse_granularity(granularity), quant_method="fp8pack")
    return out


def in_buffers(
    path: Path, *, tp: tuple[int, int] | None = None, verify: bool = False, read_nbytes: int = placement.READ_NBYTES
) -> PackedCheckpoint:
    """Load as onto a GPU, with buffers of the CPU."""
    source = open_checkpoint(path)
    contents = read_contents(source)
    parts = load._parts(contents, load.Rank(*tp)) if tp else {}
    expected = load._expected(source, contents) if verify else {}
    memory = load.fill_buffers(
        source.directory, contents, parts, expected, device=CPU, workers=3, read_nbytes=read_nbytes
    )
    return PackedCheckpoint(source, contents, memory, parts, tuple(contents.quantized))


def same(found: PackedCheckpoint, expected: PackedCheckpoint) -> bool:
    for name, tensor in expected.items():
        other = found[name]
        if isinstance(tensor, fp8pack.PackedTensor):
            assert isinstance(other, fp8pack.PackedTensor)
            assert other.block == tensor.block
            assert torch.equal(other.dequantize(torch.float32), tensor.dequantize(torch.float32))
        else:
            assert isinstance(other, torch.Tensor)
            assert torch.equal(other, tensor)
    return found.keys() == expected.keys()


@pytest.mark.parametrize("read_nbytes", [8 << 20, 5000])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_buffers_hold_what_the_files_hold(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, granularity: str, read_nbytes: int
) -> None:
    odd = {"model.layers.0.mlp.odd.weight": random_weight((131, 77), 7)}
    out = packed(make_checkpoint, tmp_path / "out", granularity, tensors=llama_tensors() | odd, shards=2)
    assert same(in_buffers(out, read_nbytes=read_nbytes), fp8pack.load_packed(out))
    assert same(in_buffers(out, verify=True, read_nbytes=read_nbytes), fp8pack.load_packed(out, verify=True))


def test_tensors_are_views_of_few_buffers_and_aligned(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    loaded = in_buffers(packed(make_checkpoint, tmp_path / "out"))
    assert isinstance(loaded._memory, load.Buffers)
    assert len(loaded._memory._buffers) == 1
    for tensor in loaded.values():
        data = tensor.qdata if isinstance(tensor, fp8pack.PackedTensor) else tensor
        assert data.data_ptr() % 16 == loaded._memory._buffers[0]._data.data_ptr() % 16
    fused = loaded.fused("model.layers.0.mlp.gate_up_proj")
    first = loaded["model.layers.0.mlp.gate_proj.weight"]
    assert isinstance(first, fp8pack.PackedTensor)
    assert fused.qdata.data_ptr() == first.qdata.data_ptr()


def test_a_selection_reads_only_its_ranges(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = packed(make_checkpoint, tmp_path / "out")
    loaded = fp8pack.load_packed(out, tensors=["*.mlp.up_proj", "model.norm"])
    assert sorted(loaded) == [
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.norm.weight",
    ]
    contents = load._select(read_contents(open_checkpoint(out)), [UP])
    read = []
    monkeypatch.setattr(load, "read_all", lambda _, reads, *rest: read.extend(reads) or {})
    load.fill_buffers(out, contents, {}, {}, device=CPU, workers=1)
    assert sum(item.nbytes for item in read) == 512 * 256 + 4 * 2 * 4
    with pytest.raises(RecipeError, match=r"nothing\.\* matches no tensor|'nothing"):
        fp8pack.load_packed(out, tensors=["nothing.*"])


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_ranks_together_hold_everything(make_checkpoint: MakeCheckpoint, tmp_path: Path, granularity: str) -> None:
    out = packed(make_checkpoint, tmp_path / "out", granularity)
    whole = fp8pack.load_packed(out)
    ranks = [fp8pack.load_packed(out, tp=(rank, 2)) for rank in range(2)]
    for rank, mapped in enumerate(ranks):
        assert same(in_buffers(out, tp=(rank, 2)), mapped)
    for leaf, axis in (("mlp.up_proj", 0), ("mlp.down_proj", 1), ("self_attn.q_proj", 0), ("self_attn.o_proj", 1)):
        name = f"model.layers.1.{leaf}.weight"
        parts = [rank[name] for rank in ranks]
        found = torch.cat([part.dequantize() for part in parts if isinstance(part, fp8pack.PackedTensor)], axis)
        expected = whole[name]
        assert isinstance(expected, fp8pack.PackedTensor)
        assert torch.equal(found, expected.dequantize())
    assert ranks[0]["model.norm.weight"].shape == (256,)


def test_ranks_are_verified_whole(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    out = packed(make_checkpoint, tmp_path / "out")
    assert same(in_buffers(out, tp=(1, 2), verify=True), fp8pack.load_packed(out, tp=(1, 2), verify=True))


def test_a_fused_weight_is_whole_or_not_at_all(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    out = packed(make_checkpoint, tmp_path / "out")
    some = fp8pack.load_packed(out, tensors="*.q_proj")
    with pytest.raises(InputError, match=r"k_proj.weight belongs to .*qkv_proj and is not loaded"):
        some.fused("model.layers.0.self_attn.qkv_proj")


def test_neighbours_in_memory_are_not_one_buffer() -> None:
    space = torch.zeros(64, dtype=torch.uint8).numpy()
    first, second = (torch.from_numpy(space[at : at + 32]).view(4, 8) for at in (0, 32))
    assert first.data_ptr() + first.nbytes == second.data_ptr()
    assert packed_checkpoint._join([first, second]).shape == (8, 8)


@pytest.mark.parametrize("method", ["comfyui", "comfyui-scaled"])
def test_markers_are_verified(make_checkpoint: MakeCheckpoint, tmp_path: Path, method: str) -> None:
    out = tmp_path / "out"
    fp8pack.pack(make_checkpoint(), out, granularity=parse_granularity("tensor"), quant_method=method)
    fp8pack.load_packed(out, verify=True)
    markers = [spec for spec in open_checkpoint(out).specs if "comfy_quant" in spec.name]
    assert bool(markers) == (method == "comfyui")
    for spec in markers[:2]:
        _flip(out / spec.file, spec.begin + 3)
        for loader in (lambda: fp8pack.load_packed(out, verify=True), lambda: in_buffers(out, verify=True)):
            with pytest.raises(VerificationError, match="comfy_quant"):
                loader()
        _flip(out / spec.file, spec.begin + 3)


def _flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_verifying_finds_a_changed_byte(make_checkpoint: MakeCheckpoint, tmp_path: Path, granularity: str) -> None:
    out = packed(make_checkpoint, tmp_path / "out", granularity)
    source = open_checkpoint(out)
    for spec in source.specs:
        if not spec.name.startswith("model.layers.1") or spec.nbytes == 0:
            continue
        _flip(out / spec.file, spec.end - 1)
        fp8pack.load_packed(out)
        for loader in (lambda: fp8pack.load_packed(out, verify=True), lambda: in_buffers(out, verify=True)):
            with pytest.raises(VerificationError, match="are not those that were packed"):
                loader()
        _flip(out / spec.file, spec.end - 1)
    fp8pack.load_packed(out, verify=True)


def test_a_changed_header_is_found(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    out = packed(make_checkpoint, tmp_path / "out")
    file = out / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data.replace(b'{"__metadata__":{"format":"pt"', b'{"__metadata__":{"format":"np"', 1))
    assert file.read_bytes() != data
    with pytest.raises(VerificationError, match="the header is not the one that was packed"):
        fp8pack.load_packed(out, verify=True)


def test_what_has_no_manifest_cannot_be_verified(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    out = packed(make_checkpoint, tmp_path / "out")
    (out / "fp8pack.json").unlink()
    fp8pack.load_packed(out)
    with pytest.raises(InputError, match=r"has no fp8pack\.json to verify it with"):
        fp8pack.load_packed(out, verify=True)


def test_very_long_rows_are_verified_in_their_bands(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    layers = {name: tensor for name, tensor in llama_tensors().items() if "layers" in name}
    asked = Request(granularity="block:128x128", quant_method="fp8pack")
    out, sizes = tmp_path / "out", Sizes(band=70_000, granule=30_000)
    verbs.pack(make_checkpoint(layers), asked, WriteOptions(out, sizes=sizes))
    manifest = fp8pack.load_packed(out).manifest
    assert manifest is not None
    assert any(getattr(entry, "band_cols", None) for entry in manifest.tensors.values())
    assert same(in_buffers(out, verify=True), fp8pack.load_packed(out, verify=True))


def test_a_copy_is_verified_in_bands_of_8_mib(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    name = "model.embed_tokens.weight"
    out = packed(make_checkpoint, tmp_path / "out", tensors=llama_tensors() | {name: random_weight((16_500, 256), 1)})
    spec = next(spec for spec in open_checkpoint(out).specs if spec.name == name)
    assert 8 << 20 < spec.nbytes < 16 << 20
    assert same(in_buffers(out, verify=True), fp8pack.load_packed(out, verify=True))
    _flip(out / spec.file, spec.end - 1)
    for loader in (lambda: fp8pack.load_packed(out, verify=True), lambda: in_buffers(out, verify=True)):
        with pytest.raises(VerificationError, match="embed_tokens"):
            loader()


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_amd_reads_the_same_values_from_its_own_bytes(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, granularity: str
) -> None:
    weight = random_weight((256, 256), 3)
    weight[0, :8] = np.array([0.0, -0.0, 1, -1, 2**-9, -(2**-9), 448, -448]).astype(weight.dtype)
    out = packed(make_checkpoint, tmp_path / "out", granularity, tensors={UP: weight})
    expected = fp8pack.load_packed(out)[UP]
    for module in (load, packed_checkpoint):
        monkeypatch.setattr(module, "describe", lambda _: DeviceFacts("hip", arch="gfx942"))
    found = in_buffers(out)[UP]
    assert isinstance(found, fp8pack.PackedTensor)
    assert isinstance(expected, fp8pack.PackedTensor)
    assert found.qdata.dtype == torch.float8_e4m3fnuz
    assert not (found.qdata.view(torch.uint8) == 0x80).any()
    assert torch.equal(found.dequantize(torch.float32), expected.dequantize(torch.float32))


def test_a_nan_has_no_counterpart_on_amd(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = packed(make_checkpoint, tmp_path / "out")
    spec = next(spec for spec in open_checkpoint(out).specs if spec.name == UP)
    data = bytearray((out / spec.file).read_bytes())
    data[spec.begin] = 0x7F
    (out / spec.file).write_bytes(data)
    monkeypatch.setattr(load, "describe", lambda _: DeviceFacts("hip", arch="gfx942"))
    with pytest.raises(InputError, match="contains a NaN"):
        in_buffers(out)


def test_shapes_alone_read_nothing(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    loaded = fp8pack.load_packed(packed(make_checkpoint, tmp_path / "out"), "meta")
    weight = loaded[UP]
    assert isinstance(weight, fp8pack.PackedTensor)
    assert (weight.qdata.is_meta, weight.shape, weight.scale.shape) == (True, (512, 256), (4, 2))
    half = fp8pack.load_packed(tmp_path / "out", "meta", tp=(1, 2))[UP]
    assert half.shape == (256, 256)
    with pytest.raises(RecipeError, match="none can be verified"):
        fp8pack.load_packed(tmp_path / "out", "meta", verify=True)
    with pytest.raises(RecipeError, match="workers is 0"):
        fp8pack.load_packed(tmp_path / "out", workers=0)


def test_a_file_that_becomes_shorter_is_an_input_error(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    out = packed(make_checkpoint, tmp_path / "out")
    source = open_checkpoint(out)
    contents = read_contents(source)
    os.truncate(out / "model.safetensors", source.specs[3].begin)
    with pytest.raises(InputError, match="was truncated during reading"):
        load.fill_buffers(out, contents, {}, {}, device=CPU, workers=2)


def test_reading_past_the_page_cache_gives_the_same_bytes(tmp_path: Path) -> None:
    data = np.random.default_rng(0).integers(0, 256, 3_000_001, np.uint8)
    path = tmp_path / "file"
    path.write_bytes(data.tobytes())
    try:
        direct = reader._DirectReader(path)
    except OSError:
        pytest.skip("this file system has no O_DIRECT")
    space = np.zeros(4 << 20, np.uint8)
    space = space[-space.ctypes.data % 4096 :]
    for offset, length in ((0, 3_000_001), (1, 5), (4095, 2), (5000, 1_000_000), (2_999_000, 1001), (8192, 4096)):
        buffer = space[offset % 4096 :][:length]
        direct.readinto(buffer.data, offset)
        np.testing.assert_array_equal(buffer, data[offset : offset + length])
    direct.close()


def test_foreign_weights_that_lie_unaligned_get_buffers_of_their_own() -> None:
    from fp8pack.modelfacts.spec import TensorSpec

    first = TensorSpec("a", "F8_E4M3", (3, 5), "f", 100, 115)
    second = TensorSpec("b", "F8_E4M3", (4, 4), "f", 115, 131)
    third = TensorSpec("c", "BF16", (2,), "f", 131, 135)
    found = placement.place([(third, None), (first, None), (replace(second), None)], {})
    assert found.buffers == (15, 20)
    assert found.places["b"] == placement.BufferPlace(1, 0)
    assert found.places["c"] == placement.BufferPlace(1, 16)


@pytest.mark.parametrize(
    ("device", "sentence"),
    [
        ("cuda", "torch finds no CUDA device"),
        (torch.device("cuda", 7), "torch finds no CUDA device"),
        ("xpu", "torch finds no XPU device"),
        ("a GPU", "unknown device 'a GPU'"),
    ],
)
def test_a_device_that_is_not_there_is_said(
    make_checkpoint: MakeCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: str | torch.device,
    sentence: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = packed(make_checkpoint, tmp_path / "out")
    for door in (fp8pack.load_packed, fp8pack.load_model):
        with pytest.raises(DeviceError, match=f"^{sentence}$") as raised:
            door(path, device)
        assert (raised.value.exit_code, raised.value.hint) == (1, "use device='cpu'")
