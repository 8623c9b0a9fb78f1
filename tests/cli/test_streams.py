"""Streams that are closed or full, outputs where none can be: the work is done, and a sentence says the rest."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import MakeCheckpoint

import fp8pack
from fp8pack.calibration.merge import merge
from fp8pack.errors import Fp8PackError, SpaceError

FILES = {"config.json", "fp8pack.json", "model.safetensors", "README.md"}


def run(redirection: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line with a shell's redirection."""
    command = ["sh", "-c", f'exec "$@" {redirection}', "sh", sys.executable, "-m", "fp8pack", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("redirection", "reason"), [(">&-", "bad file descriptor"), (">/dev/full", "no space left on device")]
)
def test_a_pack_whose_stdout_takes_nothing_is_complete_and_says_so(
    redirection: str, reason: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    ran = run(redirection, "pack", str(make_checkpoint()), "-o", str(tmp_path / "out"))
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    assert ran.returncode == 1
    assert ran.stderr.splitlines()[-1] == f"fp8pack: stdout cannot be written: {reason}"
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full", "<&- 2>&-"])
def test_a_pack_without_stderr_prints_its_data_and_nothing_else(
    redirection: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    model = str(make_checkpoint())
    ran = run(redirection, "pack", model, "-o", str(tmp_path / "out"))
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, f"{tmp_path / 'out'}\n", "")
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    ran = run(redirection, "pack", model, "-o", str(tmp_path / "none" / "out"))
    assert (ran.returncode, ran.stdout, ran.stderr) == (5, "", "")


def test_with_all_closed_no_file_of_the_output_takes_the_place_of_a_stream(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    model = make_checkpoint()
    assert run("<&- >&- 2>&-", "pack", str(model), "-o", str(tmp_path / "closed")).returncode == 1
    fp8pack.pack(model, tmp_path / "open")
    for name in FILES - {"README.md"}:
        assert (tmp_path / "closed" / name).read_bytes() == (tmp_path / "open" / name).read_bytes()


@pytest.mark.parametrize("redirection", [">&-", ">/dev/full"])
@pytest.mark.parametrize("command", ["inspect", "diff"])
def test_a_table_that_cannot_be_printed_is_one_sentence(
    command: str, redirection: str, make_checkpoint: MakeCheckpoint
) -> None:
    model = str(make_checkpoint())
    ran = run(redirection, command, *[model] * (2 if command == "diff" else 1))
    assert ran.returncode == 1
    assert ran.stderr.startswith("fp8pack: stdout cannot be written: ")
    assert len(ran.stderr.splitlines()) == 1


def test_a_table_whose_reader_went_away_ends_as_sigpipe_would(make_checkpoint: MakeCheckpoint) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "fp8pack", "inspect", str(make_checkpoint())]
    ran = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (ran.returncode, ran.stderr) == (128 + signal.SIGPIPE, "")


def test_a_version_that_cannot_be_printed_is_one_sentence() -> None:
    ran = run(">/dev/full", "--version")
    assert ran.returncode == 1
    assert ran.stderr == "fp8pack: input or output: no space left on device\n"


# Outputs where none can be.


def place(kind: str, folder: Path) -> Path:
    """A place where nothing can be made."""
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "file").write_text("")
    places = {"proc": "/proc/x", "sys": "/sys/x", "long": "/" + "a/" * 3000 + "x", "dev": "/dev/null/x"}
    return Path(places.get(kind, folder / kind / "x"))


@pytest.mark.parametrize("kind", ["proc", "sys", "long", "dev", "loop", "file", "missing"])
def test_an_output_where_nothing_can_be_made_is_one_sentence(
    kind: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    model, output = make_checkpoint(), place(kind, tmp_path)
    with pytest.raises(Fp8PackError) as refused:
        fp8pack.pack(model, output)
    assert refused.value.exit_code in (4, 5)
    assert len(str(refused.value).splitlines()) == 1


def test_a_merge_into_a_place_where_nothing_can_be_made_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fp8pack.checkpoint.calibration_file import write_calibration
    from fp8pack.planning.calibration import Calibration

    write_calibration(tmp_path / "a.safetensors", Calibration("", (), {}, ()))
    with pytest.raises(SpaceError, match="cannot be written"):
        merge([tmp_path / "a.safetensors"], "/proc/x.safetensors")

    def fail(path: Path, target: Path) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(SpaceError, match="input/output error"):
        merge([tmp_path / "a.safetensors"], tmp_path / "b.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
