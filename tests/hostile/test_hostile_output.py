"""Where the output may stand, and where it would destroy something."""

import os
from pathlib import Path
from typing import Any

import pytest
from hostile.hostile_models import Refused, files_of, pack_into

from fp8pack.errors import OutputError, SpaceError


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("place", ["model", "model/out", "model/../model", "model/sub/../out", "link", "link/out"])
def test_an_output_in_the_source_is_refused(
    place: str, overwrite: bool, built: Any, refused: Refused, tmp_path: Path
) -> None:
    model = built.single(tmp_path / "model")
    (model / "sub").mkdir()
    (tmp_path / "link").symlink_to("model")
    refused(model, OutputError, output=tmp_path / place, overwrite=overwrite)


def test_an_output_over_a_directory_that_holds_the_source_is_refused(
    built: Any, refused: Refused, tmp_path: Path
) -> None:
    model = built.single(tmp_path / "models" / "mine")
    refused(model, OutputError, output=tmp_path / "models", overwrite=True)


def test_an_output_over_a_directory_that_holds_the_source_never_deletes_the_source(built: Any, tmp_path: Path) -> None:
    model = built.single(tmp_path / "models" / "mine")
    before = files_of(model)
    with pytest.raises(OutputError):
        pack_into(model, tmp_path / "models", overwrite=True)
    assert files_of(model) == before


def test_a_single_file_packed_onto_itself_is_refused(built: Any, refused: Refused, tmp_path: Path) -> None:
    built.shard(tmp_path / "x.safetensors", built.layer(0))
    refused(tmp_path / "x.safetensors", OutputError, output=tmp_path / "x.safetensors", overwrite=True)


def test_an_output_that_is_a_file_is_refused_and_kept(built: Any, tmp_path: Path) -> None:
    model = built.single(tmp_path / "model")
    (tmp_path / "out").write_text("a file")
    with pytest.raises(OutputError, match="exists"):
        pack_into(model, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "a file"
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_that_is_a_dangling_link_is_refused_before_any_work_or_replaced(
    overwrite: bool, built: Any, tmp_path: Path
) -> None:
    model = built.single(tmp_path / "model")
    (tmp_path / "out").symlink_to("nowhere")
    try:
        pack_into(model, tmp_path / "out", overwrite=overwrite)
    except OutputError:
        assert {path.name for path in tmp_path.iterdir()} == {"model", "out"}
        assert (tmp_path / "out").is_symlink()
    else:
        assert (tmp_path / "out" / "fp8pack.json").exists()


def test_overwriting_a_link_to_a_directory_leaves_what_it_points_to(built: Any, tmp_path: Path) -> None:
    model = built.single(tmp_path / "model")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("kept")
    (tmp_path / "out").symlink_to("precious")
    try:
        pack_into(model, tmp_path / "out", overwrite=True)
    except OutputError:
        assert (tmp_path / "out").is_symlink()
    else:
        assert (tmp_path / "out" / "fp8pack.json").exists()
        assert {path.name for path in tmp_path.iterdir()} == {"model", "out", "precious"}
    assert (tmp_path / "precious" / "file").read_text() == "kept"


def test_an_output_without_a_parent_directory_is_refused(built: Any, refused: Refused, tmp_path: Path) -> None:
    refused(built.single(tmp_path / "model"), SpaceError, output=tmp_path / "missing" / "out")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_in_a_directory_that_is_not_writable_is_refused(built: Any, refused: Refused, tmp_path: Path) -> None:
    model = built.single(tmp_path / "model")
    (tmp_path / "closed").mkdir(0o555)
    refused(model, SpaceError, output=tmp_path / "closed" / "out")


@pytest.mark.parametrize("name", ["with space", "ünïcödé-模型", "line\nbreak", "-dash", "x" * 200])
def test_an_output_with_an_odd_name_is_written(name: str, built: Any, tmp_path: Path) -> None:
    model = built.single(tmp_path / "model")
    pack_into(model, tmp_path / name)
    assert {path.name for path in tmp_path.iterdir()} == {"model", name}


@pytest.mark.parametrize("length", [250, 255, 256])
def test_an_output_whose_name_is_too_long_is_refused_or_written(length: int, built: Any, tmp_path: Path) -> None:
    model = built.single(tmp_path / "model")
    try:
        pack_into(model, tmp_path / ("x" * length))
    except (OutputError, SpaceError) as error:
        assert len(str(error).splitlines()) == 1
        assert {path.name for path in tmp_path.iterdir()} == {"model"}
    else:
        assert {path.name for path in tmp_path.iterdir()} == {"model", "x" * length}
