"""What a user types without reading type-checks and works, or is refused with a sentence that speaks Python."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from api import user_code
from checkpoints import MakeCheckpoint

import fp8pack

HERE = Path(user_code.__file__).parent


def test_the_calls_of_a_user_do_what_they_say(make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(make_checkpoint().parent)
    for call in user_code.RIGHT:
        call()
    for wrong, sentence in user_code.WRONG:
        _is_refused(wrong, sentence)


def _is_refused(call: Callable[[], object], sentence: str) -> None:
    with pytest.raises(fp8pack.Fp8PackError) as caught:
        call()
    text = f"{caught.value} {caught.value.hint}"
    assert sentence in text, text
    assert "\n" not in text
    assert " --" not in text, f"an option of the command line in a sentence for Python: {text}"


def test_user_code_passes_mypy_strict() -> None:
    assert _mypy(HERE / "user_code.py") == ""


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        ("fp8pack.pack(1, 2, 3, nonsense=True)", 'Unexpected keyword argument "nonsense"'),
        ("fp8pack.pack('model', scheme=3)", 'incompatible type "int"'),
        ("fp8pack.inspect('model').tensor", 'has no attribute "tensor"'),
        ("fp8pack.pakc('model')", 'has no attribute "pakc"'),
    ],
)
def test_wrong_user_code_fails_mypy(call: str, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text(f"import fp8pack\n\n{call}\n")
    assert complaint in _mypy(tmp_path / "wrong.py")


def _mypy(path: Path) -> str:
    program = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--config-file=", str(path)]
    environment = {"MYPYPATH": str(Path(fp8pack.__file__).parents[1]), "PATH": ""}
    cache = HERE.parents[1] / ".mypy_cache" / "user"
    done = subprocess.run(
        [*program, f"--cache-dir={cache}"],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=path.parent,
    )
    return done.stdout + done.stderr
