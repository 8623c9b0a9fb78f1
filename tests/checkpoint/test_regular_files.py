"""What is checked is what is read: files are opened first, and looked at then."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from checkpoints import MakeCheckpoint

from fp8pack.checkpoint.calibration_file import read_calibration, write_calibration
from fp8pack.checkpoint.header import Header
from fp8pack.checkpoint.manifest_schema import read_manifest
from fp8pack.checkpoint.side_files import list_side_files
from fp8pack.checkpoint.source import ShardReader
from fp8pack.errors import InputError
from fp8pack.packing.prepare import WriteOptions, prepare_pack
from fp8pack.packing.write import carry_out
from fp8pack.planning.calibration import Calibration
from fp8pack.planning.recipe import Request
from fp8pack.regular_files import open_regular, read_regular, version_of


@pytest.mark.parametrize("kind", ["fifo", "directory", "device", "socket", "link to a fifo"])
def test_what_is_no_regular_file_is_refused_and_never_waited_for(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "directory":
            path.mkdir()
        case "device":
            path = Path("/dev/null")
        case "socket":
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(str(path))
        case _:
            os.mkfifo(tmp_path / "fifo")
            path.symlink_to("fifo")
    before = len(list(Path("/proc/self/fd").iterdir()))
    for read in (open_regular, read_regular, read_manifest):
        with pytest.raises(InputError, match=r"not a regular file|cannot be read"):
            read(path)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_calibration_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever takes its place while it is read is another file."""
    first, second = (Calibration(name, (), {}, ()) for name in ("first", "second"))
    write_calibration(tmp_path / "c.safetensors", first)
    write_calibration(tmp_path / "other.safetensors", second)
    genuine = ShardReader.header

    def header(reader: ShardReader) -> Header:
        (tmp_path / "other.safetensors").replace(tmp_path / "c.safetensors")
        (tmp_path / "c.safetensors").write_bytes(b"short")
        return genuine(reader)

    monkeypatch.setattr(ShardReader, "header", header)
    assert read_calibration(tmp_path / "c.safetensors").fingerprint == "first"


@pytest.mark.parametrize("how", ["a link", "another file"])
def test_a_side_file_that_was_replaced_after_it_was_looked_at_is_refused(
    how: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """A link that leads out of the model would have been refused."""
    model = make_checkpoint()
    (model / "vocab.txt").write_text("words")
    (tmp_path / "secret").write_text("words")
    prepared = prepare_pack(model, Request(), WriteOptions(output=tmp_path / "out"))
    (model / "vocab.txt").rename(tmp_path / "old")  # which keeps its inode
    if how == "a link":
        (model / "vocab.txt").symlink_to(tmp_path / "secret")
    else:
        (model / "vocab.txt").write_text("words")
    with pytest.raises(InputError, match=r"vocab\.txt was changed or replaced during the run"):
        carry_out(prepared)
    assert not (tmp_path / "out").exists()


def test_the_file_behind_an_allowed_link_is_the_one_that_is_copied(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    model = make_checkpoint()
    (model / "real.txt").write_text("words")
    (model / "vocab.txt").symlink_to("real.txt")
    (model / "broken.txt").symlink_to("nothing")
    found = {side.name: side for side in list_side_files(model, ["model.safetensors"])}
    assert found["vocab.txt"].stored == found["real.txt"].stored
    assert found["broken.txt"].rule == "a broken link"
    carry_out(prepare_pack(model, Request(), WriteOptions(output=tmp_path / "out")))
    assert not (tmp_path / "out" / "vocab.txt").is_symlink()
    assert (tmp_path / "out" / "vocab.txt").read_text() == "words"


def test_the_size_is_that_of_the_opened_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(np.zeros(5, np.uint8).tobytes())
    reader = ShardReader(tmp_path / "x")
    before = (tmp_path / "x").stat()
    (tmp_path / "y").write_bytes(b"other")
    (tmp_path / "y").replace(tmp_path / "x")
    assert reader.size == 5
    assert reader.version == version_of(before)
    reader.close()


def rewrite(path: Path) -> None:
    """Change a byte of the file and set its times back."""
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace_by_a_copy(path: Path) -> None:
    """Put another file with the same bytes and times there."""
    before = path.stat()
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes())
    os.utime(copy, ns=(before.st_atime_ns, before.st_mtime_ns))
    copy.replace(path)


@pytest.mark.parametrize("change", [rewrite, replace_by_a_copy, lambda path: path.unlink()])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_source_that_is_changed_after_the_plan_is_refused(
    change: Callable[[Path], None], name: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    model = make_checkpoint()
    prepared = prepare_pack(model, Request(), WriteOptions(output=tmp_path / "out"))
    change(model / name)
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        carry_out(prepared)
    assert not (tmp_path / "out").exists()


def test_a_source_that_is_changed_at_the_very_end_is_refused(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    model = make_checkpoint()
    prepared = prepare_pack(model, Request(), WriteOptions(output=tmp_path / "out"))

    def at_the_end(done: int, total: int) -> None:
        if done == total:
            rewrite(model / "model.safetensors")

    with pytest.raises(InputError, match="was changed or replaced during the run"):
        carry_out(prepared, at_the_end)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_weights_and_config_that_link_out_of_the_model_are_refused(
    name: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    model = make_checkpoint()
    (model / name).rename(tmp_path / name)
    (model / name).symlink_to(tmp_path / name)
    with pytest.raises(InputError, match="outside the model"):
        prepare_pack(model, Request(), WriteOptions(output=tmp_path / "out"))


def test_a_reader_is_closed_once(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"x")
    reader = ShardReader(tmp_path / "x")
    reader.close()
    other = os.open(tmp_path / "x", os.O_RDONLY)  # gets the number that is free now
    reader.close()
    assert os.pread(other, 1, 0) == b"x"
    os.close(other)
