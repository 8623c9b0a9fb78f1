"""What a user types without reading type-checks and works, or is refused with a sentence that speaks Python."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from api import user_code
from checkpoints import MakeCheckpoint

import fp8pack


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


WRONG = {
    "fp8pack.pack(1, 2, 3, nonsense=True)": 'Unexpected keyword argument "nonsense"',
    "fp8pack.pack('model', scheme=3)": 'incompatible type "int"',
    "fp8pack.inspect('model').tensor": 'has no attribute "tensor"',
    "fp8pack.pakc('model')": 'has no attribute "pakc"',
}


@pytest.mark.slow
def test_mypy_takes_what_is_right_and_refuses_what_is_wrong(tmp_path: Path) -> None:
    """Both files in one run; the types of torch and transformers are not at stake, and take a minute."""
    wrong = tmp_path / "wrong.py"
    wrong.write_text("\n".join(["import fp8pack", *WRONG]) + "\n")
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--no-error-summary",
        "--config-file=",
        "--cache-dir",
        str(tmp_path),
    ]
    environment = os.environ | {"MYPYPATH": str(Path(fp8pack.__file__).parents[1])}
    files = [str(user_code.__file__), str(wrong)]
    done = subprocess.run(
        [*command, *files], capture_output=True, text=True, check=False, env=environment, cwd=tmp_path
    )
    found = done.stdout.splitlines()
    for line, complaint in enumerate(WRONG.values(), 2):
        assert any(f"wrong.py:{line}:" in text and complaint in text for text in found), (complaint, found)
    assert not [text for text in found if "wrong.py" not in text and "note:" not in text]
