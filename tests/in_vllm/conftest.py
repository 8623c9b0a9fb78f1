"""These tests need vLLM, which `make test-vllm` installs beside an older transformers; else none is collected."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from fp8pack.errors import BoundError

if find_spec("vllm") is None:
    collect_ignore_glob = ["*"]
else:
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }

Verb = Callable[..., dict[str, Any]]


def run(*arguments: str | Path) -> dict[str, Any]:
    """Run fp8pack as a process of its own: vLLM, which looks into every module, stumbles over llvmlite's."""
    command = [sys.executable, "-m", "fp8pack", *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in (0, BoundError.exit_code), done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Write a family's model once; return its directory."""
    from in_vllm.models import save

    return cache(lambda family: save(family, tmp_path_factory.mktemp(family) / "model"))


@pytest.fixture(scope="session")
def calibration(source: Callable[[str], Path]) -> Callable[[str], Path]:
    """Calibrate a family's model once; return the file."""

    @cache
    def calibrate(family: str) -> Path:
        path = source(family).with_name("calibration.safetensors")
        run("calibrate", source(family), "-o", path, "--num-prompts", "4", "--max-length", "64", "--all-experts")
        return path

    return calibrate


@pytest.fixture(scope="session")
def table() -> Iterator[Any]:
    """Collect what happened, and write docs/vllm.md at the end."""
    from in_vllm import kernels
    from in_vllm.table import Table

    kernels.register()
    found = Table()
    yield found
    found.write()


@pytest.fixture
def pack(source: Callable[[str], Path], calibration: Callable[[str], Path], tmp_path: Path) -> Verb:
    """Pack a family's model into `out`; return the verdict on the vLLM that runs here."""
    from in_vllm.cases import WAYS, is_static

    def pack(family: str, way: str) -> dict[str, Any]:
        static = ("--calibration", calibration(family)) if is_static(way) else ()
        run("pack", source(family), "-o", tmp_path / "out", *WAYS[way], *static)
        result = run("inspect", tmp_path / "out", "--target", f"vllm=={version('vllm-cpu')}")
        return next(verdict for verdict in result["engines"] if verdict["engine"] == "vllm")

    return pack
