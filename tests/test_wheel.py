"""The wheel has what it needs, and works in an environment with its own requirements alone."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fp8pack
from fp8pack.engines.known import ENGINES

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "examples" / "demo-qwen3"

pytestmark = pytest.mark.slow


def run(*command: object, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # which hides the wheel
    words = list(map(str, command))
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT, cwd=folder)
    (found,) = folder.glob("*.whl")
    return found


def test_the_wheel_holds_prompts_headers_types_and_the_licence(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {"_data/prompts.jsonl", "_data/include/fp8pack.hpp", "_data/include/fp8pack_safetensors.hpp", "py.typed"}
    wanted |= {"report/page/page.css", "report/page/page.js"}
    wanted |= {f"engines/data/{engine.facts}.json" for engine in ENGINES if engine.facts}
    assert {f"fp8pack/{name}" for name in wanted} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert fp8pack.__version__ in wheel.name
    assert not any(name.startswith(("tests/", "docs/", "examples/")) for name in names)


def test_the_wheel_works_with_its_own_requirements_alone(wheel: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", tmp_path / "empty", cwd=tmp_path)
    python = tmp_path / "empty" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", wheel, cwd=tmp_path)
    run(tmp_path / "empty" / "bin" / "fp8pack", "pack", DEMO, "-o", tmp_path / "out", "-q", cwd=tmp_path)
    program = "import fp8pack; print(len(fp8pack.load_packed('out', verify=True)), fp8pack.__file__)"
    count, home = run(python, "-c", program, cwd=tmp_path).split()
    assert count == "46"
    assert Path(home).is_relative_to(tmp_path)
