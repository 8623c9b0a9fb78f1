"""What others put where the unfinished output goes: it is refused, and nothing is written through it."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hostile.hostile_models import pack_into

from fp8pack.errors import OutputError

Plant = Callable[[Path, Path], None]


def folder_of(tmp_path: Path) -> Path:
    return tmp_path / ".out.fp8pack-partial"


def link(*parts: str) -> Plant:
    """Plant a link below the staging directory."""

    def plant(folder: Path, victim: Path) -> None:
        place = folder.joinpath(*parts)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(victim)

    return plant


def fifo(*parts: str) -> Plant:
    """Plant a pipe below the staging directory."""

    def plant(folder: Path, victim: Path) -> None:
        folder.mkdir(exist_ok=True)
        os.mkfifo(folder.joinpath(*parts))

    return plant


def plain_file(folder: Path, victim: Path) -> None:
    folder.write_text("a file")


@pytest.mark.parametrize(
    "plant",
    [
        *(link(), link("lock"), link("journal.jsonl"), link("output"), link("output", "model.safetensors")),
        *(link("output", "config.json"), link("output", "sub"), fifo("lock"), fifo("journal.jsonl"), plain_file),
    ],
)
@pytest.mark.parametrize("is_directory", [False, True])
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_planted_for_the_staging_directory_is_refused(
    plant: Plant, is_directory: bool, overwrite: bool, built: Any, tmp_path: Path
) -> None:
    model = built.single(tmp_path / "model")
    victim = tmp_path / "victim"
    if is_directory:
        victim.mkdir()
    kept = victim / "model.safetensors" if is_directory else victim
    kept.write_text("precious")
    plant(folder_of(tmp_path), victim)
    with pytest.raises(OutputError, match="fp8pack-partial"):
        pack_into(model, tmp_path / "out", overwrite=overwrite)
    assert kept.read_text() == "precious"
    assert not is_directory or [path.name for path in victim.iterdir()] == ["model.safetensors"]
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes a directory of another user")
def test_a_staging_directory_of_another_user_is_refused(built: Any, tmp_path: Path) -> None:
    model = built.single(tmp_path / "model")
    folder_of(tmp_path).mkdir(mode=0o777)
    os.chown(folder_of(tmp_path), 54321, 54321)
    with pytest.raises(OutputError, match="belongs to another user"):
        pack_into(model, tmp_path / "out")


def test_nobody_else_can_look_into_unfinished_work(built: Any, tmp_path: Path) -> None:
    model = built.single(tmp_path / "model")
    folder_of(tmp_path).mkdir(mode=0o777)
    modes = []
    pack_into(
        model,
        tmp_path / "out",
        on_progress=lambda done, total: modes.append(folder_of(tmp_path).stat().st_mode & 0o777),
    )
    assert set(modes) == {0o700}
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~umask


def test_what_is_planted_as_an_old_output_does_not_become_the_output(built: Any, tmp_path: Path) -> None:
    model = built.single(tmp_path / "model")
    old = tmp_path / ".out.fp8pack-old"
    (tmp_path / "victim").mkdir()
    old.symlink_to("victim")
    with pytest.raises(OutputError, match="fp8pack-old"):
        pack_into(model, tmp_path / "out")
    old.unlink()
    old.mkdir()
    (old / "letter.txt").write_text("mine")
    with pytest.raises(OutputError, match="fp8pack-old"):
        pack_into(model, tmp_path / "out")
    assert (old / "letter.txt").read_text() == "mine"
