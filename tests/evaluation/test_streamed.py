"""One layer at a time gives what the whole model gives; what is done is kept, and used only where it belongs."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from calibration.tiny_models import make_model, save_model

import fp8pack
from fp8pack.errors import DeadlineError, InputError, OutputError, RecipeError, VerificationError

Case = tuple[Path, list[Path], dict[str, Any]]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Return a source, two checkpoints, and the options of every evaluation."""
    folder = tmp_path_factory.mktemp("streamed")
    model = save_model(make_model("qwen3_moe"), folder / "model")
    paths = [folder / "FP8_DYNAMIC", folder / "FP8_SCALED"]
    for path in paths:
        fp8pack.pack(model, path, scheme=path.name)
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": f"text {i}, not long"}) + "\n" for i in range(9)))
    return model, paths, {"text": str(folder / "texts.jsonl"), "device": "cpu"}


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


def test_streamed_equals_resident_bit_for_bit(case: Case) -> None:
    source, paths, options = case
    resident = fp8pack.evaluate(paths, source, stream_layers="off", **options)
    streamed = fp8pack.evaluate(paths, source, stream_layers="on", **options)
    assert streamed.checkpoints == resident.checkpoints
    assert streamed.perplexity == resident.perplexity


def test_a_saved_base_takes_the_place_of_the_source(case: Case, tmp_path: Path) -> None:
    source, paths, options = case
    base = tmp_path / "base.safetensors"
    first = fp8pack.evaluate(paths[0], source, save_base=base, **options)
    done: list[tuple[int, int]] = []
    both = fp8pack.evaluate(paths, source, base=base, on_progress=lambda *found: done.append(found), **options)
    assert both.checkpoints[0] == first.checkpoints[0]
    with pytest.raises(OutputError, match="exists"):
        fp8pack.evaluate(paths[0], source, save_base=base, **options)
    with pytest.raises(InputError, match="of another text or tokenizer"):
        fp8pack.evaluate(paths[0], source, base=base, num_tokens=30, **options)
    with pytest.raises(InputError, match="of another dtype"):
        fp8pack.evaluate(paths[0], source, base=base, dtype="bfloat16", **options)
    with pytest.raises(InputError, match="of another source"):
        fp8pack.evaluate(paths[1], paths[0], base=base, **options)
    with pytest.raises(InputError, match="is no base"):
        fp8pack.evaluate(paths[0], source, base=source / "model.safetensors", **options)
    with pytest.raises(RecipeError, match="either used or saved"):
        fp8pack.evaluate(paths[0], source, base=base, save_base=tmp_path / "other", **options)
    damaged = bytearray(base.read_bytes())
    damaged[-5] ^= 1
    base.write_bytes(damaged)
    with pytest.raises(VerificationError, match="is damaged"):
        fp8pack.evaluate(paths[0], source, base=base, **options)


class Stopped(Exception):
    """Ends an evaluation from its progress."""


def test_what_is_done_is_not_done_again(case: Case, tmp_path: Path) -> None:
    source, paths, options = case
    expected = fp8pack.evaluate(paths, source, **options)
    with pytest.raises(RecipeError, match="a deadline needs a place"):
        fp8pack.evaluate(paths, source, deadline="1s", **options)
    state = {"state": tmp_path / "state"} | options
    with pytest.raises(DeadlineError, match="the deadline is reached with 0 of"):
        fp8pack.evaluate(paths, source, deadline=0, **state)
    begins = []
    for stop in (0.3, 0.6, 0.9, 2.0):
        seen: list[int] = []

        def watch(done: int, total: int, stop: float = stop, seen: list[int] = seen) -> None:
            seen.append(done)
            if done >= stop * total:
                raise Stopped

        try:
            found = fp8pack.evaluate(paths, source, on_progress=watch, **state)
        except Stopped:
            assert list((tmp_path / "state").iterdir())
        begins.append(seen[0])
    assert begins[0] == 0 < begins[1] <= begins[2] <= begins[3]
    assert found.checkpoints == expected.checkpoints
    assert not list((tmp_path / "state").iterdir())


def test_after_a_kill_the_same_command_continues(case: Case, tmp_path: Path) -> None:
    source, paths, options = case
    words = ["eval", *map(str, paths), "--against", str(source), "--text", options["text"], "--json", "-q"]
    command = [sys.executable, "-m", "fp8pack", *words, "--state", str(tmp_path / "state")]
    whole = subprocess.run(command, capture_output=True, text=True, check=True)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not list(tmp_path.glob("state/*/model-0/done-*")) and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    first, second = (json.loads(done.stdout) for done in (whole, again))
    assert first["checkpoints"] == second["checkpoints"]
