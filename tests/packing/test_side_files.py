"""Side files are work like any other: shared among the threads, counted, stopped between pieces, resumed."""

import errno
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import MakeCheckpoint

from fp8pack.checkpoint.side_files import list_side_files
from fp8pack.checkpoint.staging import Staging
from fp8pack.errors import DeadlineError, InputError
from fp8pack.packing import side_work
from fp8pack.packing.prepare import WriteOptions, prepare_pack
from fp8pack.packing.side_work import SideWork
from fp8pack.packing.workers import Stop
from fp8pack.packing.write import carry_out
from fp8pack.planning.recipe import Request

LARGE = bytes(range(256)) * 13_000  # three pieces, and some
SIDE_FILES = {"assets/large.bin.txt": LARGE, "empty.txt": b"", "tokenizer.json": b"{}"}


@pytest.fixture
def model(make_checkpoint: MakeCheckpoint) -> Path:
    """Return a checkpoint with side files."""
    folder = make_checkpoint(shards=2)
    for name, data in SIDE_FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch, model: Path, tmp_path: Path) -> Path:
    """Return the staging directory of a pack that was stopped just before its commit."""

    def stop(staging: Staging, *, overwrite: bool) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Staging, "commit", stop)
        run(model, tmp_path)
    return tmp_path / ".out.fp8pack-partial"


def run(
    model: Path, folder: Path, on_progress: Callable[[int, int], None] = lambda done, total: None, **how: Any
) -> Any:
    """Pack; return what was done."""
    return carry_out(prepare_pack(model, Request(), WriteOptions(output=folder / "out", **how)), on_progress)


def check(folder: Path, expected: dict[str, bytes]) -> None:
    """The output has these side files, which its manifest knows, and no others."""
    files = json.loads((folder / "out" / "fp8pack.json").read_text())["files"]
    for name, data in expected.items():
        assert (folder / "out" / name).read_bytes() == data
        assert files[name]["size"] == len(data)
    found = {path.relative_to(folder / "out").as_posix() for path in (folder / "out").rglob("*") if path.is_file()}
    assert found == {*files, "fp8pack.json"}


def test_their_bytes_count_and_the_threads_copy_them(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine, seen, threads = SideWork.copy, [], set()

    def copy(work: SideWork, *arguments: Any, **keywords: Any) -> str:
        threads.add(threading.current_thread())
        return genuine(work, *arguments, **keywords)

    monkeypatch.setattr(SideWork, "copy", copy)
    run(model, tmp_path, lambda done, total: seen.append((done, total)))
    tensors = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    assert seen[-1][0] == seen[-1][1]
    assert tensors > seen[-1][1] - sum(map(len, SIDE_FILES.values())) > 0.9 * tensors
    assert threading.main_thread() not in threads
    check(tmp_path, SIDE_FILES)


def test_a_copy_stops_between_pieces(model: Path, tmp_path: Path) -> None:
    side = next(side for side in list_side_files(model, []) if side.size == len(LARGE))
    stop, counted = Stop(), []

    def count(nbytes: int) -> None:
        counted.append(nbytes)
        if len(counted) == 2:
            stop.event.set()

    assert SideWork(side).copy(model, tmp_path, stop=stop, count=count) == ""
    assert counted == [1 << 20] * 2


def test_a_deadline_stops_a_copy_and_the_same_call_continues(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine = side_work._pieces

    def pieces(side: Any, directory: Path) -> Any:
        for index, piece in enumerate(genuine(side, directory)):
            if index == 1:
                over.append(side.name)
            yield piece

    over: list[str] = []
    with monkeypatch.context() as patched:
        patched.setattr(side_work, "_pieces", pieces)
        patched.setattr(Stop, "is_set", lambda stop: bool(over) or stop.event.is_set())
        with pytest.raises(DeadlineError, match="the deadline is reached"):
            run(model, tmp_path, workers=1)
    assert over == ["assets/large.bin.txt"]
    assert not (tmp_path / "out").exists()
    run(model, tmp_path)
    check(tmp_path, SIDE_FILES)


def test_finished_copies_are_not_made_again(
    interrupted: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SideWork, "copy", None)
    assert run(model, tmp_path).resumed_nbytes > len(LARGE)
    check(tmp_path, SIDE_FILES)


@pytest.mark.parametrize("change", ["new bytes", "replaced", "gone", "lost", "cut", "an old journal"])
def test_what_changed_since_is_copied_again(change: str, interrupted: Path, model: Path, tmp_path: Path) -> None:
    place, expected = model / "assets" / "large.bin.txt", dict(SIDE_FILES)
    staged = interrupted / "output" / "assets" / "large.bin.txt"
    match change:
        case "new bytes":
            expected["assets/large.bin.txt"] = LARGE[::-1]
            place.write_bytes(LARGE[::-1])
        case "replaced":
            expected["assets/large.bin.txt"] = LARGE[::-1]
            (model / "new").write_bytes(LARGE[::-1])
            (model / "new").replace(place)
        case "gone":
            del expected["assets/large.bin.txt"]
            place.unlink()
        case "lost":
            staged.unlink()
        case "cut":
            staged.write_bytes(LARGE[:-1])
        case _:
            lines = (interrupted / "journal.jsonl").read_text().splitlines(keepends=True)
            (interrupted / "journal.jsonl").write_text("".join(line for line in lines if '"side"' not in line))
    run(model, tmp_path)
    check(tmp_path, expected)
    assert ("assets" in {path.name for path in (tmp_path / "out").iterdir()}) == (change != "gone")


def test_a_directory_that_cannot_be_read_is_refused(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_checkpoint()
    (model / "assets").mkdir()
    scan = os.scandir

    def without_permission(path: str) -> Any:
        if Path(path).name == "assets":
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", without_permission)
    with pytest.raises(InputError, match=r"^assets/ of .* cannot be read: permission denied$"):
        list_side_files(model, ["model.safetensors"])


@pytest.mark.parametrize("name", [b"\xff\xfe.txt", b"\xff/a.txt", b"\xff.bin"])
def test_a_name_that_is_not_in_utf8_is_refused(name: bytes, make_checkpoint: MakeCheckpoint) -> None:
    model = make_checkpoint()
    place = Path(os.fsdecode(os.fsencode(model) + b"/" + name))
    place.parent.mkdir(exist_ok=True)
    place.write_bytes(b"x")
    with pytest.raises(InputError, match="is not a name in UTF-8"):
        list_side_files(model, ["model.safetensors"])
