"""What is checked is what is read: files are opened first, and looked at then."""

import os
import socket
from pathlib import Path

import numpy as np
import pytest
from checkpoints import MakeCheckpoint

from fp8pack.checkpoint.calibration_file import read_calibration, write_calibration
from fp8pack.checkpoint.header import Header
from fp8pack.checkpoint.manifest_schema import read_manifest
from fp8pack.checkpoint.regular_files import open_regular, read_regular
from fp8pack.checkpoint.side_files import list_side_files
from fp8pack.checkpoint.source import ShardReader
from fp8pack.errors import InputError
from fp8pack.packing.prepare import WriteOptions, prepare_pack
from fp8pack.packing.write import carry_out
from fp8pack.planning.calibration import Calibration
from fp8pack.planning.recipe import Request


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
    with pytest.raises(InputError, match=r"vocab\.txt was replaced during reading"):
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
    assert found["vocab.txt"].identity == found["real.txt"].identity
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
    assert reader.identity == (before.st_dev, before.st_ino)
    reader.close()
