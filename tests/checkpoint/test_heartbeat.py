"""Whatever a run is busy with, other hosts see that it is alive: the age of its lock tells them."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import verbs
from checkpoints import DEMO

import fp8pack
from fp8pack.calibration.options import CalibrateOptions
from fp8pack.checkpoint import heartbeat
from fp8pack.checkpoint.staging import Staging
from fp8pack.errors import SpaceError
from fp8pack.modelrun.loader import ModelLoader
from fp8pack.packing import write as writing

PATIENCE_SECONDS = 60.0


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the heart beat at once."""
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.001)


def wait_for(condition: Callable[[], bool]) -> None:
    """Return when a condition holds."""
    give_up = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.001)


def check_beats(staging: Staging) -> None:
    """Make the lock of a staging directory old, and wait until it is young again."""
    lock = staging.folder / "lock"
    for _ in range(2):  # the first beat may have been on its way
        os.utime(lock, (0, 0))
        wait_for(lambda: lock.stat().st_mtime > 0)


def hearts() -> list[str]:
    """The threads that beat."""
    return [thread.name for thread in threading.enumerate() if "heartbeat" in thread.name]


def test_a_lock_stays_young_while_it_is_held(tmp_path: Path) -> None:
    staging = Staging(tmp_path / "out")
    with staging:
        check_beats(staging)
        assert len(hearts()) == 1
    assert hearts() == []


def test_a_lock_that_is_refused_leaves_no_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(staging: Staging) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Staging, "_finish_swap", fail)
    with pytest.raises(KeyboardInterrupt), Staging(tmp_path / "out"):
        pass
    assert hearts() == []


def test_a_pack_beats_while_it_writes_what_is_no_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine, beaten = writing.write_metadata, []

    def slow(*arguments: Any) -> str:
        check_beats(Staging(tmp_path / "out"))
        beaten.append(True)
        return genuine(*arguments)

    monkeypatch.setattr(writing, "write_metadata", slow)
    fp8pack.pack(DEMO, tmp_path / "out")
    assert beaten
    assert hearts() == []


def test_a_calibration_beats_while_it_loads_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"text": "one"}\n{"text": "two"}\n')
    options = CalibrateOptions(
        output=tmp_path / "out.safetensors", prompts=str(prompts), max_length=8, stream_layers="off"
    )
    genuine, beaten = ModelLoader.load_all, []

    def slow(loader: ModelLoader) -> None:
        check_beats(Staging(tmp_path / "out.safetensors"))
        beaten.append(True)
        genuine(loader)

    monkeypatch.setattr(ModelLoader, "load_all", slow)
    verbs.calibrate(DEMO, options)
    assert beaten
    assert hearts() == []


def test_a_beat_that_failed_may_succeed_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failures = iter([OSError(5, "Input/output error")] * 3)
    genuine, is_over = os.utime, threading.Event()

    def flaky(*arguments: Any) -> None:
        if error := next(failures, None):
            raise error
        genuine(*arguments)
        is_over.set()

    staging = Staging(tmp_path / "out")
    monkeypatch.setattr(os, "utime", flaky)
    with staging:
        assert is_over.wait(PATIENCE_SECONDS)
        staging.commit(overwrite=False)
    assert (tmp_path / "out").is_dir()


def test_nothing_is_committed_by_an_owner_that_seems_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    has_failed = threading.Event()

    def fail(*arguments: Any) -> None:
        has_failed.set()
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "utime", fail)
    staging = Staging(tmp_path / "out")
    with staging:
        (staging.content / "work").write_text("done")
        staging.journal.write_text("head\nwork\n")
        assert has_failed.wait(PATIENCE_SECONDS)
        wait_for(lambda: staging._heart is not None and staging._heart._error is not None)
        with pytest.raises(SpaceError, match="lock cannot be written: input/output error"):
            staging.commit(overwrite=False)
        with pytest.raises(SpaceError):
            staging.commit_file(overwrite=False)
    assert (staging.content / "work").read_text() == "done"
    assert not (tmp_path / "out").exists()
