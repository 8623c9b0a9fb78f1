"""Where the compiled kernels are kept, and that nothing depends on it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fp8pack.numerics import kernel_cache

RUN = """
import numpy as np
from fp8pack.numerics.native import amax_rows
print(amax_rows(np.full((2, 3), 0x3F80, np.uint16), dtype="BF16"))
"""
BECOME_NOBODY = """
import os
import numpy as np
from fp8pack.numerics.native import amax_rows
amax_rows(np.zeros((2, 3), np.uint32), dtype="F32")  # imports what another user may not be allowed to read
os.setgid({nobody})
os.setuid({nobody})
del os.environ["FP8PACK_CACHE_DIR"]
"""
NOBODY = 54321  # who has no entry in passwd
ROOT = Path(__file__).parents[2]


def run(environment: dict[str, str], before: str = "") -> str:
    """What the kernel says in a process with this environment and nothing else of ours."""
    environment = {"PYTHONPATH": str(ROOT)} | environment
    ran = subprocess.run(
        [sys.executable, "-c", before + RUN], env=environment, cwd="/", capture_output=True, text=True, check=False
    )
    assert ran.stderr == ""
    return ran.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")
def test_a_user_without_a_home_or_a_name_compiles_anew() -> None:
    assert run({"FP8PACK_CACHE_DIR": "/dev/null"}, BECOME_NOBODY.format(nobody=NOBODY)) == "1.0\n"


@pytest.mark.parametrize("place", ["/dev/null", "/dev/null/below", "/proc/fp8pack"])
def test_a_place_that_is_no_directory_keeps_nothing(place: str) -> None:
    assert run({"FP8PACK_CACHE_DIR": place}) == "1.0\n"


def test_without_a_home_there_is_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.delenv("FP8PACK_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert kernel_cache.cache_dir() is None
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert kernel_cache.cache_dir() == Path("/somewhere/fp8pack")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of the cache, made by keeping something in it."""
    place = tmp_path / "home" / "fp8pack"
    monkeypatch.setenv("FP8PACK_CACHE_DIR", str(place))
    kernel_cache.write_code("a.o", b"code")
    assert kernel_cache.read_code("a.o") == b"code"
    assert (place.stat().st_mode & 0o777, (place / "a.o").stat().st_mode & 0o777) == (0o700, 0o600)
    return place


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_nothing_is_read_where_others_may_write(folder: Path, mode: int) -> None:
    folder.chmod(mode)
    assert kernel_cache.read_code("a.o") is None
    kernel_cache.write_code("b.o", b"code")
    assert [path.name for path in folder.iterdir()] == ["a.o"]


@pytest.mark.parametrize("mode", [0o620, 0o602])
def test_a_file_that_others_may_write_is_not_read(folder: Path, mode: int) -> None:
    (folder / "a.o").chmod(mode)
    assert kernel_cache.read_code("a.o") is None


def test_links_are_not_followed(folder: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere.o"
    (folder / "a.o").rename(elsewhere)
    (folder / "a.o").symlink_to(elsewhere)
    assert kernel_cache.read_code("a.o") is None
    (folder / "a.o").unlink()
    (folder / "a.o").hardlink_to(elsewhere)
    assert kernel_cache.read_code("a.o") is None
    (folder / f"b.o.{os.getpid()}").symlink_to(elsewhere)
    kernel_cache.write_code("b.o", b"other")
    assert kernel_cache.read_code("b.o") is None
    assert elsewhere.read_bytes().endswith(b"code")


def test_what_is_not_whole_or_no_file_is_not_read(folder: Path) -> None:
    (folder / "a.o").write_bytes((folder / "a.o").read_bytes()[:-1])
    assert kernel_cache.read_code("a.o") is None
    (folder / "b.o").mkdir()
    assert kernel_cache.read_code("b.o") is None
    os.mkfifo(folder / "c.o")
    assert kernel_cache.read_code("c.o") is None
