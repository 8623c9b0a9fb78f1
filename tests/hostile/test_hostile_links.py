"""Links, pipes and files that are none: what a checkpoint may not reach, and what is left out."""

import os
import socket
from pathlib import Path
from typing import Any

import pytest
from hostile.hostile_models import INDEX, Refused, files_of, pack_into

from fp8pack.errors import InputError


@pytest.mark.parametrize("target", ["/etc/passwd", "../secret", "../model-two/tokenizer.json", "sub/../../secret"])
def test_a_side_file_that_links_out_of_the_model_is_refused(
    target: str, built: Any, refused: Refused, tmp_path: Path
) -> None:
    model = built.single(tmp_path / "model")
    (tmp_path / "secret").write_text("secret")
    (model / "sub").mkdir()
    (model / "tokenizer.json").symlink_to(target)
    assert "tokenizer.json" in refused(model)


def test_a_directory_that_links_out_of_the_model_is_refused(built: Any, refused: Refused, tmp_path: Path) -> None:
    model = built.single(tmp_path / "model")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "secret").write_text("secret")
    (model / "assets").symlink_to("../elsewhere")
    refused(model)


def test_a_side_file_that_links_within_the_model_is_copied(built: Any, tmp_path: Path) -> None:
    model = built.single(tmp_path / "model")
    (model / "vocab.txt").write_text("words")
    (model / "tokenizer.txt").symlink_to("vocab.txt")
    pack_into(model, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.txt").read_text() == "words"
    assert not (tmp_path / "out" / "tokenizer.txt").is_symlink()


def test_a_hub_snapshot_whose_links_lead_into_blobs_is_packed(built: Any, tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--org--name"
    snapshot = repository / "snapshots" / "0123abcd"
    plain = built.single(tmp_path / "plain")
    (plain / "tokenizer.json").write_text("{}")
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(plain.iterdir())):
        path.rename(repository / "blobs" / f"{number:064}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:064}")
    pack_into(snapshot, tmp_path / "out")
    names = {"README.md", "config.json", "fp8pack.json", "model.safetensors", "tokenizer.json"}
    assert set(files_of(tmp_path / "out")) == names
    assert "base_model: org/name\nbase_model_relation: quantized\n" in (tmp_path / "out" / "README.md").read_text()
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


@pytest.mark.parametrize("target", [".", "..", "../model", "assets/loop"])
def test_a_loop_of_directories_is_refused_or_left_out(target: str, built: Any, tmp_path: Path) -> None:
    model = built.single(tmp_path / "model")
    (model / "assets").mkdir()
    (model / "assets" / "loop").symlink_to(target)
    try:
        facts = pack_into(model, tmp_path / "out")
    except InputError as error:
        assert "loop" in str(error)
        assert not (tmp_path / "out").exists()
    else:
        assert [entry.file for entry in facts.skipped] == ["assets/loop"]


def test_a_link_to_itself_is_refused_or_left_out(built: Any, tmp_path: Path) -> None:
    model = built.single(tmp_path / "model")
    (model / "tokenizer.json").symlink_to("tokenizer.json")
    try:
        facts = pack_into(model, tmp_path / "out")
    except InputError as error:
        assert "tokenizer.json" in str(error)
    else:
        assert [entry.file for entry in facts.skipped] == ["tokenizer.json"]


def test_a_broken_link_is_left_out_and_reported(built: Any, tmp_path: Path) -> None:
    model = built.single(tmp_path / "model")
    (model / "tokenizer.json").symlink_to("gone.json")
    facts = pack_into(model, tmp_path / "out")
    assert [entry.file for entry in facts.skipped] == ["tokenizer.json"]


@pytest.mark.parametrize("target", ["gone", "config.json", "/dev/null"])
def test_a_config_that_is_no_readable_file_is_refused_and_not_taken_as_absent(
    target: str, built: Any, refused: Refused, tmp_path: Path
) -> None:
    model = built.single(tmp_path / "model")
    (model / "config.json").unlink()
    (model / "config.json").symlink_to(target)
    assert "config.json" in refused(model)


@pytest.mark.parametrize("target", ["gone", "model.safetensors", "/dev/zero", "."])
def test_a_shard_that_is_no_readable_file_is_refused(target: str, built: Any, refused: Refused, tmp_path: Path) -> None:
    model = built.single(tmp_path / "model")
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to(target)
    assert "model.safetensors" in refused(model)


def test_a_fifo_or_socket_beside_the_weights_is_left_out_and_reported(built: Any, tmp_path: Path) -> None:
    model = built.single(tmp_path / "model")
    os.mkfifo(model / "tokenizer.json")
    with socket.socket(socket.AF_UNIX) as server:
        folder = os.open(model, os.O_RDONLY)
        server.bind(f"/proc/self/fd/{folder}/server.sock")  # the path itself may be too long for a socket
        os.close(folder)
    facts = pack_into(model, tmp_path / "out")
    assert {entry.file for entry in facts.skipped} == {"tokenizer.json", "server.sock"}


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", INDEX])
def test_a_fifo_in_the_place_of_a_file_that_is_needed_is_refused(
    name: str, built: Any, refused: Refused, tmp_path: Path
) -> None:
    model = built.sharded(tmp_path / "model") if name == INDEX else built.single(tmp_path / "model")
    (model / name).unlink()
    os.mkfifo(model / name)
    assert name in refused(model)


def test_a_hard_link_is_a_file_like_any_other(built: Any, tmp_path: Path) -> None:
    model = built.single(tmp_path / "model")
    (tmp_path / "vocab.txt").write_text("words")
    os.link(tmp_path / "vocab.txt", model / "vocab.txt")
    pack_into(model, tmp_path / "out")
    assert (tmp_path / "out" / "vocab.txt").read_text() == "words"
    assert (tmp_path / "out" / "vocab.txt").stat().st_nlink == 1


def test_overwriting_a_hard_link_to_the_source_leaves_the_source_alone(built: Any, tmp_path: Path) -> None:
    source, output = tmp_path / "x.safetensors", tmp_path / "y.safetensors"
    built.shard(source, built.layer(0))
    before = source.read_bytes()
    os.link(source, output)
    pack_into(source, output, overwrite=True)
    assert source.read_bytes() == before
    assert output.read_bytes() != before
