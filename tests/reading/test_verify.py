"""`verify`: every byte of every kind of file counts, and every difference is listed."""

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from blake3 import blake3
from calibration.tiny_models import make_model, save_model
from checkpoints import MakeCheckpoint, llama_tensors
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file

import fp8pack
from fp8pack.checkpoint.header import read_header
from fp8pack.checkpoint.manifest import canonical, compare_written, digest_of_bands, write_manifest
from fp8pack.errors import RecipeError, VerificationError
from fp8pack.reading.verification import Verification

FIXTURES = Path(__file__).parents[1] / "interop" / "fixtures"
SIDES = {"tokenizer.json": b'{"model": {}}', "assets/chat.jinja": b"{{ messages }}"}


@pytest.fixture
def source(make_checkpoint: MakeCheckpoint) -> Path:
    """Return a checkpoint in two shards, with side files."""
    model = make_checkpoint(shards=2)
    for name, data in SIDES.items():
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_bytes(data)
    return model


@pytest.fixture
def packed(source: Path, tmp_path: Path) -> Path:
    """Return what is packed of it."""
    fp8pack.pack(source, tmp_path / "packed", scheme="FP8_BLOCK")
    return tmp_path / "packed"


def flip(path: Path, bit: int) -> None:
    """Flip one bit of a file."""
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def tensor_at(path: Path, offset: int) -> str | None:
    """The tensor of a shard that a byte lies in; None in its header."""
    with path.open("rb") as file:
        header = read_header(file.fileno(), path.name)
    return next((spec.name for spec in header.tensors if spec.begin <= offset < spec.end), None)


@pytest.mark.parametrize("scheme", ["FP8_BLOCK", "FP8_DYNAMIC", "MXFP8", "FP8_SCALED"])
def test_what_was_packed_is_whole(scheme: str, source: Path, tmp_path: Path) -> None:
    result = fp8pack.pack(source, tmp_path / "out", scheme=scheme)
    found = fp8pack.verify(tmp_path / "out")
    assert found.ok
    assert found.root == result.root
    assert found.num_tensors == found.all_tensors > result.num_packed
    assert found.nbytes == result.output_nbytes
    assert not found.unknown
    assert not found.other_files


@pytest.mark.parametrize("kind", ["unpacked", "cast", "converted", "single"])
def test_every_kind_of_output_is_whole_or_named(kind: str, source: Path, packed: Path, tmp_path: Path) -> None:
    out = tmp_path / ("out.safetensors" if kind == "single" else "out")
    match kind:
        case "unpacked":
            fp8pack.unpack(packed, out)
        case "cast":
            fp8pack.pack(source, out, kept_dtype="float16")
        case "converted":
            fp8pack.convert(packed, out, quant_method="compressed-tensors")
        case _:
            save_arrays(llama_tensors(), tmp_path / "x.safetensors")
            fp8pack.pack(tmp_path / "x.safetensors", out, scheme="FP8_SCALED")
    found = fp8pack.verify(out)
    assert found.ok
    assert found.num_tensors == found.all_tensors
    shard = out if out.is_file() else min(out.glob("*.safetensors"))
    offset = shard.stat().st_size - 1
    flip(shard, offset * 8)
    [difference] = fp8pack.verify(out).differences
    assert (difference.file, difference.tensor) == (shard.name, tensor_at(shard, offset))


@pytest.mark.parametrize("seed", range(40))
def test_a_flipped_bit_is_found_and_named(seed: int, packed: Path) -> None:
    chance = random.Random(seed)
    files = sorted(path for path in packed.rglob("*") if path.is_file())
    path = files[seed % len(files)]
    bit = chance.randrange(path.stat().st_size * 8)
    tensor = tensor_at(path, bit // 8) if path.suffix == ".safetensors" else None
    flip(path, bit)
    found = fp8pack.verify(packed)
    assert not found.ok
    files = {difference.file for difference in found.differences}
    assert path.relative_to(packed).as_posix() in files
    assert len(files) == 1 or "fp8pack.json is damaged, so what it says of other files may be wrong" in found.unknown
    assert tensor in {difference.tensor for difference in found.differences}


def test_a_manifest_that_is_changed_with_its_root_is_found_by_the_files(packed: Path) -> None:
    path = packed / "fp8pack.json"
    document = json.loads(path.read_bytes())
    document["files"]["tokenizer.json"]["size"] += 1
    document["root"] = oracle.root_of(document)
    path.write_text(json.dumps(document))
    found = [str(difference) for difference in fp8pack.verify(packed).differences]
    assert any(line.startswith("fp8pack.json: it is not written as fp8pack writes it") for line in found)
    assert any(line.startswith("tokenizer.json: it has") for line in found)


def test_a_manifest_is_compared_byte_for_byte(packed: Path) -> None:
    raw = (packed / "fp8pack.json").read_bytes()
    document = json.loads(raw)
    assert compare_written(document, raw) == (True, document["root"])
    for other in (raw + b"\n", raw[:-1], canonical(document).encode()):
        assert compare_written(document, other) == (False, document["root"])
    assert compare_written({**document, "tensors": 3}, raw) == (False, "")
    changed = {**document, "source": {**document["source"], "fingerprint": "blake3:" + "0" * 64}}
    assert compare_written(changed, raw) == (False, oracle.root_of(changed))


def test_all_differences_are_listed_not_the_first(packed: Path) -> None:
    shards = sorted(packed.glob("*.safetensors"))
    for shard in shards:
        flip(shard, (shard.stat().st_size - 1) * 8)
    (packed / "tokenizer.json").unlink()
    (packed / "assets" / "chat.jinja").write_bytes(b"short")
    (packed / "letter.txt").write_text("extra")
    found = fp8pack.verify(packed)
    assert {difference.file for difference in found.differences} == {
        *(shard.name for shard in shards),
        "tokenizer.json",
        "assets/chat.jinja",
    }
    assert found.other_files == ("letter.txt",)
    with pytest.raises(VerificationError, match="has 4 differences"):
        found.check()


def test_files_that_are_not_in_the_manifest_differ_if_asked(packed: Path) -> None:
    for name in ("letter.txt", ".gitattributes", "SHA256SUMS", ".cache/huggingface/x"):
        (packed / name).parent.mkdir(parents=True, exist_ok=True)
        (packed / name).write_text("")
    assert fp8pack.verify(packed).ok
    [difference] = fp8pack.verify(packed, strict=True).differences
    assert difference.file == "letter.txt"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def another_header(path: Path) -> None:
    tensors = load_file(path)
    save_file(tensors, path)


@pytest.mark.parametrize("damage", [truncate, another_header, lambda path: path.write_bytes(b"not a shard")])
def test_a_shard_whose_tensors_cannot_be_found_is_named_and_the_rest_is_read(
    damage: Callable[[Path], None], packed: Path
) -> None:
    first, second = sorted(packed.glob("*.safetensors"))
    damage(first)
    flip(second, (second.stat().st_size - 1) * 8)
    found = fp8pack.verify(packed)
    assert {difference.file for difference in found.differences} == {first.name, second.name}
    assert f"the tensors of {first.name} were not compared" in found.unknown


def test_quick_reads_no_weight(packed: Path) -> None:
    shard = min(packed.glob("*.safetensors"))
    flip(shard, (shard.stat().st_size - 1) * 8)
    found = fp8pack.verify(packed, quick=True)
    assert found.ok
    assert (found.num_tensors, found.nbytes) == (0, 0)
    assert "weights were not read" in found.unknown
    flip(packed / "config.json", 9)
    assert not fp8pack.verify(packed, quick=True).ok


def test_the_parts_of_a_sample_read_every_tensor_once(packed: Path) -> None:
    whole = fp8pack.verify(packed)
    parts = [fp8pack.verify(packed, sample=f"{i}/7") for i in range(1, 8)]
    assert sum(part.num_tensors for part in parts) == whole.num_tensors
    assert sum(part.nbytes for part in parts) == whole.nbytes
    shard = min(packed.glob("*.safetensors"))
    flip(shard, (shard.stat().st_size - 1) * 8)
    assert sum(not fp8pack.verify(packed, sample=f"{i}/7").ok for i in range(1, 8)) == 1


@pytest.mark.parametrize("sample", ["0/7", "8/7", "1", "1/0", "a/b", "1/7/7", "-1/7"])
def test_a_sample_is_a_part_of_a_whole(sample: str, packed: Path) -> None:
    with pytest.raises(RecipeError, match="is no part of a whole"):
        fp8pack.verify(packed, sample=sample)


def with_scale(packed: Path, value: float, tmp_path: Path) -> Verification:
    """Verify a copy that another tool might have made: without a manifest, and with a scale of this value."""
    shutil.copytree(packed, tmp_path / "copy", dirs_exist_ok=True)
    (tmp_path / "copy" / "fp8pack.json").unlink(missing_ok=True)
    shard = min((tmp_path / "copy").glob("*.safetensors"))
    tensors = load_file(shard)
    name = next(name for name in tensors if name.endswith("_scale_inv"))
    tensors[name][0, 0] = value
    save_file(tensors, shard, {"format": "pt"})
    found = fp8pack.verify(tmp_path / "copy")
    assert all(difference.tensor == name for difference in found.differences)
    return found


def test_of_another_tools_files_what_can_be_known_is_known(packed: Path, tmp_path: Path) -> None:
    for value, words in (
        (float("nan"), "NaN or infinite"),
        (float("inf"), "NaN or infinite"),
        (-1.0, "negative"),
        (0.0, "zero"),
        (1e38, "overflow"),
    ):
        [difference] = with_scale(packed, value, tmp_path).differences
        assert words in difference.problem
    assert with_scale(packed, 0.5, tmp_path).ok
    assert "there is no fp8pack.json" in with_scale(packed, 0.5, tmp_path).unknown[0]


def test_a_nan_byte_and_a_missing_scale_of_another_tools_files_are_found(packed: Path, tmp_path: Path) -> None:
    (packed / "fp8pack.json").unlink()
    shard = min(packed.glob("*.safetensors"))
    tensors = load_file(shard)
    name = next(name for name in tensors if f"{name}_scale_inv" in tensors)
    tensors[name].view(torch.uint8)[3, 5] = 0x7F
    save_file(tensors, shard, {"format": "pt"})
    [difference] = fp8pack.verify(packed).differences
    assert (difference.tensor, difference.problem) == (name, "the payload has a NaN or infinity")
    del tensors[f"{name}_scale_inv"]
    save_file(tensors, shard, {"format": "pt"})
    [difference] = fp8pack.verify(packed).differences
    assert name in difference.problem


def test_sums_are_written_once_and_then_compared(packed: Path) -> None:
    assert fp8pack.verify(packed, sha256=True).ok
    done = subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=packed, check=False)
    assert done.returncode == 0
    names = {line.split("  ", 1)[1] for line in (packed / "SHA256SUMS").read_text().splitlines()}
    assert names == {path.relative_to(packed).as_posix() for path in packed.rglob("*") if path.is_file()} - {
        "SHA256SUMS"
    }
    assert fp8pack.verify(packed, sha256=True).ok
    (packed / "tokenizer.json").write_text("{}")
    problems = [str(difference) for difference in fp8pack.verify(packed, sha256=True).differences]
    assert "tokenizer.json: its SHA-256 is not the one in SHA256SUMS" in problems


def test_of_a_damaged_checkpoint_no_sums_are_written(packed: Path) -> None:
    (packed / "tokenizer.json").write_text("{}")
    assert not fp8pack.verify(packed, sha256=True).ok
    assert not (packed / "SHA256SUMS").exists()


@pytest.mark.parametrize("fixture", sorted(filter(Path.is_dir, FIXTURES.iterdir())), ids=lambda path: path.name)
def test_what_other_tools_made_has_no_difference(fixture: Path) -> None:
    found = fp8pack.verify(fixture)
    assert found.ok, found.differences
    assert found.num_files


def test_the_command_lists_differences_and_ends_with_6(packed: Path) -> None:
    command = [sys.executable, "-m", "fp8pack", "verify", str(packed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "result   no difference"
    (packed / "tokenizer.json").unlink()
    (packed / "config.json").write_text("{}")
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 6
    found = {entry["file"]: entry["problem"] for entry in json.loads(done.stdout)["differences"]}
    assert found["tokenizer.json"] == "it is missing"
    assert found["config.json"].startswith("it has 2 bytes instead of")
    assert done.stderr.startswith(f"fp8pack: {packed} has 2 differences")


@pytest.mark.slow
def test_of_two_thousand_flipped_bits_every_one_is_found_and_named(source: Path, packed: Path) -> None:
    """Over every kind of file, and in shards over headers, payloads, scales and kept tensors alike.

    Every tenth is repaired.
    """
    chance = random.Random(13)
    files = sorted(path for path in packed.rglob("*") if path.is_file())
    shards = {path: bounds_of(path) for path in files if path.suffix == ".safetensors"}
    missed = []
    for i in range(2000):
        path = files[i % len(files)]
        begin, end, tensor = chance.choice(shards[path]) if path in shards else (0, path.stat().st_size, None)
        place, bit = chance.randrange(begin, end), chance.randrange(8)
        with path.open("r+b") as file:
            file.seek(place)
            [byte] = file.read(1)
            file.seek(place)
            file.write(bytes([byte ^ 1 << bit]))
        found = {(difference.file, difference.tensor) for difference in fp8pack.verify(packed).differences}
        if (path.relative_to(packed).as_posix(), tensor) not in found:
            missed.append((path.name, place, bit, found))
        if i % 10 == 0 and path.name != "fp8pack.json":
            assert fp8pack.verify(packed, against=source, repair=True).ok
        with path.open("r+b") as file:
            file.seek(place)
            assert i % 10 or path.name == "fp8pack.json" or file.read(1) == bytes([byte])
            file.seek(place)
            file.write(bytes([byte]))
    assert not missed
    assert fp8pack.verify(packed).ok


def bounds_of(path: Path) -> list[tuple[int, int, str | None]]:
    """The first byte of the header and of each tensor, the byte after the last, and the tensor's name."""
    with path.open("rb") as file:
        header = read_header(file.fileno(), path.name)
    tensors: list[tuple[int, int, str | None]] = [(spec.begin, spec.end, spec.name) for spec in header.tensors]
    return [(0, header.data_begin, None), *tensors]


# Against the source.


def pack_otherwise(packed: Path, tensor: str) -> None:
    """Change a byte of a tensor, and write a manifest that says so: whole in itself, and not what packing gives."""
    manifest = json.loads((packed / "fp8pack.json").read_bytes())
    shard = packed / manifest["tensors"][tensor]["file"]
    begin = next(begin for begin, _, name in bounds_of(shard) if name == tensor)
    flip(shard, begin * 8)
    entry = manifest["tensors"][tensor]
    for difference in fp8pack.verify(packed).differences:
        assert difference.tensor == tensor
    with shard.open("rb") as file:
        spec = next(spec for spec in read_header(file.fileno(), shard.name).tensors if spec.name == tensor)
        file.seek(spec.begin)
        data = file.read(spec.nbytes)
    entry["digest"] = digest_of_bands([blake3(data).digest()])
    head = {name: section for name, section in manifest.items() if name not in ("tensors", "root")}
    write_manifest(packed / "fp8pack.json", head, sorted(manifest["tensors"].items()))


@pytest.mark.parametrize("scheme", ["FP8_BLOCK", "FP8_DYNAMIC", "MXFP8", "FP8_SCALED"])
def test_what_was_packed_is_what_packing_gives(scheme: str, source: Path, tmp_path: Path) -> None:
    fp8pack.pack(source, tmp_path / "out", scheme=scheme, ignore="*.0.mlp.up_proj", kept_dtype="float16")
    before = contents(tmp_path / "out")
    found = fp8pack.verify(tmp_path / "out", against=source)
    assert found.ok
    assert "README.md was not recomputed: it says where the source lies" in found.unknown
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("kind", ["converted", "unpacked", "single", "resharded"])
def test_every_kind_of_output_is_recomputed(kind: str, source: Path, packed: Path, tmp_path: Path) -> None:
    out, origin = tmp_path / "out", packed
    match kind:
        case "converted":
            fp8pack.convert(packed, out, scheme="FP8_DYNAMIC")
        case "unpacked":
            fp8pack.unpack(packed, out)
        case "resharded":
            fp8pack.pack(source, out, max_shard_size="100kB")
            origin = source
        case _:
            out, origin = tmp_path / "out.safetensors", tmp_path / "x.safetensors"
            save_arrays(llama_tensors(), origin)
            fp8pack.pack(origin, out, scheme="FP8_SCALED")
    assert fp8pack.verify(out, against=origin).ok


@pytest.mark.parametrize("tensor", ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"])
def test_a_byte_that_packing_does_not_give_is_found_although_the_manifest_has_it(
    tensor: str, source: Path, packed: Path
) -> None:
    pack_otherwise(packed, tensor)
    assert fp8pack.verify(packed).ok
    [difference] = fp8pack.verify(packed, against=source).differences
    assert (difference.tensor, difference.problem) == (tensor, "it is not what packing the source gives, by digest")


def test_files_that_the_source_has_not_are_found_and_copied_ones_are_its_own(source: Path, tmp_path: Path) -> None:
    (source / "training_args.bin").write_bytes(b"training")
    out = tmp_path / "out"
    fp8pack.pack(source, out, copy="training_args.bin")
    assert fp8pack.verify(out, against=source).ok
    (out / "code.py").write_text("evil")
    manifest = json.loads((out / "fp8pack.json").read_bytes())
    manifest["files"]["code.py"] = {"size": 4, "digest": f"blake3:{blake3(b'evil').hexdigest()}"}
    head = {name: section for name, section in manifest.items() if name not in ("tensors", "root")}
    write_manifest(out / "fp8pack.json", head, sorted(manifest["tensors"].items()))
    assert fp8pack.verify(out).ok
    [difference] = fp8pack.verify(out, against=source).differences
    assert str(difference) == "code.py: it is not what packing the source gives"


def test_another_source_is_refused(source: Path, packed: Path, make_checkpoint: MakeCheckpoint) -> None:
    other = make_checkpoint(llama_tensors(1), name="other")
    with pytest.raises(fp8pack.InputError, match=r"is not what .* was packed from"):
        fp8pack.verify(packed, against=other)
    (packed / "fp8pack.json").unlink()
    with pytest.raises(fp8pack.InputError, match=r"has no fp8pack\.json"):
        fp8pack.verify(packed, against=source)


# Repaired from the source.


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("seed", range(25))
def test_a_flipped_bit_is_repaired_in_place(seed: int, source: Path, packed: Path) -> None:
    before = contents(packed)
    files = sorted(name for name in before if name != "fp8pack.json")
    path, chance = packed / files[seed % len(files)], random.Random(seed)
    flip(path, chance.randrange(path.stat().st_size * 8))
    found = fp8pack.verify(packed, against=source, repair=True)
    assert found.ok
    assert {difference.file for difference in found.repaired} == {path.relative_to(packed).as_posix()}
    assert contents(packed) == before


@pytest.mark.parametrize("scheme", ["FP8_SCALED", "MXFP8"])
@pytest.mark.parametrize("kind", ["missing", "short", "long", "header", "everything"])
def test_what_is_missing_or_of_another_size_is_repaired(kind: str, scheme: str, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    fp8pack.pack(source, out, scheme=scheme)
    before, shard = contents(out), min(out.glob("*.safetensors"))
    match kind:
        case "missing":
            shard.unlink()
        case "short":
            truncate(shard)
        case "long":
            shard.write_bytes(shard.read_bytes() + b"x")
        case "header":
            another_header(shard)
        case _:
            for path in sorted(out.rglob("*"), reverse=True):
                if path.is_file() and path.name != "fp8pack.json":
                    path.unlink()
    assert fp8pack.verify(out, against=source, repair=True).ok
    assert contents(out) == before


def test_a_repair_is_refused_where_it_cannot_be_right(
    source: Path, packed: Path, make_checkpoint: MakeCheckpoint
) -> None:
    (packed / "config.json").write_text("{}")
    with pytest.raises(RecipeError, match="a repair needs the source"):
        fp8pack.verify(packed, repair=True)
    with pytest.raises(fp8pack.InputError, match=r"is not what .* was packed from"):
        fp8pack.verify(packed, against=make_checkpoint(llama_tensors(1), name="other"), repair=True)
    with pytest.raises(RecipeError, match="for the repair of a manifest"):
        fp8pack.verify(packed, against=source, root="0" * 64)
    assert (packed / "config.json").read_text() == "{}"


@pytest.fixture(params=[(True, {"warmup": 1}), (True, {"percentile": 99}), (False, {"margin": 1})])
def static(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Return a mixture of experts, its calibration over few prompts, and what is packed of both."""
    folder = tmp_path_factory.mktemp("static")
    all_experts, how = request.param
    model = save_model(make_model("qwen3_moe"), folder / "model")
    (folder / "prompts.txt").write_text("one prompt\nanother\nand a third, longer one\n")
    options: dict[str, Any] = {"prompts": str(folder / "prompts.txt"), "all_experts": all_experts}
    fp8pack.calibrate(model, output=folder / "calibration.safetensors", **options)
    given = {"calibration": folder / "calibration.safetensors", "kv_cache": True, **how}
    fp8pack.pack(model, folder / "out", scheme="FP8", **given)
    return model, folder / "calibration.safetensors", folder / "out"


def test_scales_of_activations_are_recomputed_with_the_calibration_alone(static: tuple[Path, Path, Path]) -> None:
    model, calibration, out = static
    entries = json.loads((out / "fp8pack.json").read_text())["tensors"].values()
    scales = [scale for entry in entries for scale in entry.get("activation_scales", ())]
    assert {"input", "k", "v"} == {scale["kind"] for scale in scales}
    assert {scale["source"] for scale in scales} in ({"routed", "all_experts"}, {"routed", "peers"})
    note = "scales of activations were not recomputed: add --calibration FILE"
    assert not fp8pack.verify(out, against=model).differences
    assert note in fp8pack.verify(out, against=model).unknown
    found = fp8pack.verify(out, against=model, calibration=calibration)
    assert found.ok
    assert note not in found.unknown


@pytest.mark.parametrize("seed", range(24))
def test_a_damaged_manifest_is_rebuilt(seed: int, source: Path, tmp_path: Path) -> None:
    out, chance = tmp_path / "out", random.Random(seed)
    fp8pack.pack(source, out, scheme="FP8_BLOCK", max_shard_size=None if seed % 2 else "100KB")
    before = contents(out)
    flip(out / "fp8pack.json", chance.randrange(len(before["fp8pack.json"]) * 8))
    if seed % 3 == 0:
        flip(min(out.glob("*.safetensors")), -5)
    root = json.loads(before["fp8pack.json"])["root"]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("scheme: FP8_BLOCK\n")
    found = fp8pack.verify(out, against=source, repair=True, root=root, recipe=recipe)
    assert found.ok
    assert "fp8pack.json" in {difference.file for difference in found.repaired}
    assert contents(out) == before


def test_a_manifest_is_rebuilt_only_into_what_was_packed(source: Path, packed: Path, tmp_path: Path) -> None:
    before = contents(packed)
    raw = before["fp8pack.json"]
    root = json.loads(raw)["root"]
    broken = raw.replace(b'"action"', b'"actiom"', 1)
    (packed / "fp8pack.json").write_bytes(broken)
    with pytest.raises(VerificationError, match="has another root than"):
        fp8pack.verify(packed, against=source, repair=True, root="0" * 64)
    assert contents(packed) == {**before, "fp8pack.json": broken}
    assert fp8pack.verify(packed, against=source, repair=True).ok  # the recipe and the root are in lines that are whole
    assert contents(packed) == before
    (packed / "fp8pack.json").write_bytes(raw.replace(b'"root"', b'"r00t"'))
    with pytest.raises(RecipeError, match="does not say which root is right"):
        fp8pack.verify(packed, against=source, repair=True)
    (packed / "fp8pack.json").unlink()
    (tmp_path / "recipe.yaml").write_text("scheme: FP8_BLOCK\n")
    missing = fp8pack.verify(packed, against=source, repair=True, root=root, recipe=tmp_path / "recipe.yaml")
    assert missing.ok
    assert contents(packed) == before


@pytest.mark.parametrize("scheme", ["FP8_BLOCK", "FP8_SCALED"])
@pytest.mark.parametrize("size", ["1KB", "40KB", "100KB", "150KB"])
def test_shards_that_were_cut_by_size_are_compared_and_repaired(
    size: str, scheme: str, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    fp8pack.pack(source, out, scheme=scheme, max_shard_size=size)
    before = contents(out)
    assert fp8pack.verify(out, against=source).ok
    for shard in out.glob("*.safetensors"):
        flip(shard, -3)
    (out / "model.safetensors.index.json").unlink()
    assert fp8pack.verify(out, against=source, repair=True).ok
    assert contents(out) == before


def test_the_command_says_what_it_repaired(source: Path, packed: Path) -> None:
    (packed / "tokenizer.json").unlink()
    command = [sys.executable, "-m", "fp8pack", "verify", str(packed), "--against", str(source), "--repair"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "repaired tokenizer.json: it is missing"
