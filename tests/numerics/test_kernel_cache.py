"""Where the compiled kernels are kept, and that nothing depends on it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fp8pack.numerics import native

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
    assert native._cache_dir() is None
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert native._cache_dir() == Path("/somewhere/fp8pack")
