"""Whatever ends a calibration, the same command goes on, ends in the same bytes, and leaves nothing behind."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import verbs
from calibration.resume_bench import DIE_AT, PATIENCE_SECONDS, PROMPTS, SLOW, STOP_AT, Bench, Server
from checkpoints import DEMO

from fp8pack.calibration.calibration_journal import CalibrationJournal
from fp8pack.checkpoint.calibration_file import read_calibration
from fp8pack.checkpoint.staging import Staging
from fp8pack.errors import Fp8PackError, OutputError

pytestmark = pytest.mark.slow

MODES = ("off", "on")  # --stream-layers
KILLS = [("off", lines) for lines in random.Random(7).sample(range(2, PROMPTS), 2)] + [("on", 2), ("on", 4)]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Multiply matrices here as in the other processes: their sums depend on the number of threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    assert server.process.stdin is not None
    assert server.process.stdout is not None
    server.process.stdin.close()
    server.process.wait(timeout=PATIENCE_SECONDS)
    server.process.stdout.close()


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    words = (DEMO / "heldout.txt").read_text().split()
    texts = [" ".join(words[30 * i : 30 * i + 8 + 2 * i]) for i in range(PROMPTS)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def reference(server: Server, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a run that nothing disturbed."""
    bench = Bench(server, tmp_path_factory.mktemp("reference"), prompts, b"")
    ran = bench.run("off", prelude="")
    assert ran.code == 0, ran.stderr
    return bench.output.read_bytes()


@pytest.fixture
def bench(server: Server, prompts: Path, reference: bytes, tmp_path: Path) -> Bench:
    (tmp_path / "place").mkdir()
    return Bench(server, tmp_path / "place", prompts, reference)


@pytest.fixture(scope="module")
def unfinished(
    server: Server, prompts: Path, reference: bytes, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A staging directory of each mode that a deadline left in the middle."""
    found = {}
    for mode in MODES:
        bench = Bench(server, tmp_path_factory.mktemp(f"unfinished-{mode}"), prompts, reference)
        ran = bench.run(mode, prelude=STOP_AT.format(n=5 if mode == "off" else 2 * PROMPTS + 5))
        assert ran.code == 7, ran.stderr
        bench.check_message(ran, "deadline", "the same command continues")
        found[mode] = bench.staging
    return found


@pytest.fixture
def leave(bench: Bench, unfinished: dict[str, Path]) -> Callable[[str], None]:
    """Return a function that puts an unfinished calibration beside the output of the bench."""
    return lambda mode: shutil.copytree(unfinished[mode], bench.staging) and None


# Killed.


@pytest.mark.parametrize("mode", MODES)
def test_a_run_that_nothing_disturbs_gives_the_same_bytes_with_and_without_saving(mode: str, bench: Bench) -> None:
    bench.check_complete(bench.run(mode))


@pytest.mark.parametrize(("mode", "lines"), KILLS)
def test_a_calibration_killed_at_a_random_moment_continues_to_the_same_bytes(
    mode: str, lines: int, bench: Bench
) -> None:
    running = bench.start(mode)
    running.reach(lines)
    assert running.kill().code == -signal.SIGKILL
    assert bench.staging.exists()
    assert not bench.output.exists()
    bench.check_complete(bench.run(mode, prelude=""))


def test_a_calibration_killed_again_and_again_continues_to_the_same_bytes(bench: Bench) -> None:
    for lines in (4, 8):
        running = bench.start("off")
        running.reach(lines)
        running.kill()
    bench.check_complete(bench.run("off"))


@pytest.fixture(scope="module")
def num_changes(
    server: Server, prompts: Path, reference: bytes, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, int]:
    """How many calls of a run in each mode change the file system."""
    found = {}
    for mode in MODES:
        bench = Bench(server, tmp_path_factory.mktemp(f"count-{mode}"), prompts, reference)
        ran = bench.run(mode, prelude=SLOW + DIE_AT.format(n=0))
        assert ran.code == 0, ran.stderr
        found[mode] = int(ran.stderr.splitlines()[-1])
    return found


@pytest.mark.parametrize("mode", MODES)
def test_a_calibration_killed_before_a_change_of_the_file_system_continues_to_the_same_bytes(
    mode: str, num_changes: dict[str, int], bench: Bench
) -> None:
    """Early, before every third of those of one save in the middle, and before the last, where it is committed."""
    total = num_changes[mode]
    places = [2, *range(total // 2, total // 2 + 12, 3), *range(total - 6, total + 1)]
    wrong = {}
    for place in places:
        ran = bench.run(mode, prelude=SLOW + DIE_AT.format(n=place))
        assert ran.code == -signal.SIGKILL, (place, ran.stderr)
        assert not bench.output.exists() or bench.output.read_bytes() == bench.reference
        try:
            verbs.calibrate(DEMO, bench.options(mode))
        except Fp8PackError as error:
            wrong[place - total] = str(error)
        else:
            if bench.output.read_bytes() != bench.reference:
                wrong[place - total] = "other bytes"
            elif left := [path.name for path in bench.folder.iterdir() if path != bench.output]:
                wrong[place - total] = f"{left} is left behind"
        shutil.rmtree(bench.folder)
        bench.folder.mkdir()
    assert not wrong, f"counted from the last change, which is 0: {wrong}"


# Interrupted.


@pytest.mark.parametrize(("mode", "lines", "signum"), [("off", 5, signal.SIGINT), ("on", 2, signal.SIGTERM)])
def test_a_signal_ends_with_its_code_and_the_same_command_continues(
    mode: str, lines: int, signum: int, bench: Bench
) -> None:
    running = bench.start(mode)
    running.reach(lines)
    ran = running.kill(signum)
    assert ran.code == 128 + signum
    bench.check_message(ran, "interrupted", "the same command continues")
    assert bench.staging.exists()
    bench.check_complete(bench.run(mode, prelude=""))


def test_a_signal_before_anything_is_finished_leaves_nothing_behind(bench: Bench) -> None:
    pause = "import signal\nfrom fp8pack.calibration.progress import Progress\n"
    pause += "Progress.tick = lambda self, tokens: signal.pause()\n"
    running = bench.start("off", prelude=pause)
    running.reach(1)
    ran = running.kill(signal.SIGTERM)
    assert ran.code == 143
    assert list(bench.folder.iterdir()) == []


def test_the_module_itself_ends_with_130(tmp_path: Path) -> None:
    """`python -m fp8pack calibrate`, as it saves by itself."""
    staging = tmp_path / ".out.safetensors.fp8pack-partial"
    command = [sys.executable, "-m", "fp8pack", "calibrate", str(DEMO), "-o", str(tmp_path / "out.safetensors")]
    command += ["--num-prompts", "128"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    give_up = time.monotonic() + PATIENCE_SECONDS
    journal = staging / "journal.jsonl"
    while not (journal.exists() and journal.read_bytes().count(b"\n") >= 2):
        assert process.poll() is None
        assert time.monotonic() < give_up
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=PATIENCE_SECONDS)
    assert (process.returncode, stdout) == (130, "")
    assert "Traceback" not in stderr
    assert stderr.splitlines()[-1].startswith("fp8pack: interrupted")


def test_a_deadline_that_comes_with_every_prompt_still_ends_in_the_same_bytes(bench: Bench, prompts: Path) -> None:
    codes = []
    for n in (1, 3, 2):
        ran = bench.run("off", "--deadline", "1h", prelude=STOP_AT.format(n=n))
        codes.append(ran.code)
        bench.check_message(ran, "deadline", "the same command continues")
    assert codes == [7] * 3
    state = read_calibration(bench.staging / "output" / "state.safetensors")
    assert len(state.prompts) == 6
    bench.finish_here()


def test_a_deadline_of_nothing_does_one_prompt(bench: Bench) -> None:
    ran = bench.run("off", "--deadline", "0s", prelude="")
    assert ran.code == 7
    bench.check_message(ran, "deadline")
    assert len(read_calibration(bench.staging / "output" / "state.safetensors").prompts) == 1


@pytest.mark.parametrize("n", [1, PROMPTS, PROMPTS + 3])
def test_a_streamed_run_continues_after_a_deadline_anywhere_in_a_layer(n: int, bench: Bench) -> None:
    ran = bench.run("on", prelude=STOP_AT.format(n=n))
    assert ran.code == 7
    bench.check_message(ran, "deadline", "the same command continues")
    bench.finish_here("on")


def test_a_streamed_run_with_a_deadline_shorter_than_a_layer_says_so(bench: Bench) -> None:
    """The unit of a streamed run is a layer, so such a run would begin the same one again and again."""
    for _ in range(2):
        ran = bench.run("on", prelude=STOP_AT.format(n=2))
        assert ran.code == 7
        assert "before a layer was finished" in ran.stderr.splitlines()[-1]
        assert "more time" in ran.stderr.splitlines()[-1]


# What an unfinished calibration left behind.


@pytest.mark.parametrize("mode", MODES)
def test_an_unfinished_calibration_is_continued_and_not_begun_again(
    mode: str, bench: Bench, leave: Callable[[str], None]
) -> None:
    leave(mode)
    seen: list[tuple[int, int]] = []
    verbs.calibrate(DEMO, bench.options(mode), on_progress=lambda done, total: seen.append((done, total)))
    bench.check_output()
    assert len(seen) == (PROMPTS - 5 if mode == "off" else 3 * PROMPTS)
    assert seen[-1][0] == seen[-1][1]


TORN: dict[str, Callable[[bytes], bytes]] = {
    "half-a-line": lambda text: text + b'{"done": 9',
    "a-line-without-end": lambda text: text + b'{"done": 8}',
    "zeros": lambda text: text + bytes(40),
    "zeros-and-an-end": lambda text: text + bytes(40) + b"\n",
    "an-empty-line": lambda text: text + b"\n",
    "a-line-of-text": lambda text: text + b"done\n",
    "a-list": lambda text: text + b"[9]\n",
    "a-number-as-text": lambda text: text + b'{"done": "9"}\n',
    "a-fraction": lambda text: text + b'{"done": 9.5}\n',
    "nothing-left": lambda text: b"",
    "half-of-the-head": lambda text: text[:20],
    "only-the-head": lambda text: text[: text.index(b"\n") + 1],
    "a-head-of-another-version": lambda text: text.replace(b'"version": 1', b'"version": 0'),
    "bytes-that-are-no-text": lambda text: text + b"\xff\xfe\n",
}


@pytest.mark.parametrize(
    ("mode", "name"),
    [*(("off", name) for name in TORN), ("on", "half-a-line"), ("on", "zeros-and-an-end"), ("on", "only-the-head")],
)
def test_a_torn_journal_never_changes_the_bytes(
    mode: str, name: str, bench: Bench, leave: Callable[[str], None]
) -> None:
    leave(mode)
    journal = bench.staging / "journal.jsonl"
    journal.write_bytes(TORN[name](journal.read_bytes()))
    bench.finish_here(mode)


@pytest.mark.parametrize("name", ["zeros-and-an-end", "a-line-of-text", "an-empty-line", "half-a-line"])
def test_what_is_noted_after_a_torn_line_is_found_again(name: str, tmp_path: Path) -> None:
    """A journal that goes on behind a line that nobody can read must not lose what comes after it."""
    path, head = tmp_path / "journal.jsonl", {"fingerprint": "f", "prompts": "p", "options": {"a": 1}, "streamed": True}
    assert CalibrationJournal(path).resume(head, throw_away=False) == 0
    CalibrationJournal(path).add(1)
    path.write_bytes(TORN[name](path.read_bytes()))
    assert CalibrationJournal(path).resume(head, throw_away=False) == 1
    CalibrationJournal(path).add(2)
    assert CalibrationJournal(path).resume(head, throw_away=False) == 2


@pytest.mark.parametrize(("before", "after"), [("off", "on"), ("on", "off")])
def test_streaming_that_changed_meanwhile_is_refused_or_gives_the_same_bytes(
    before: str, after: str, bench: Bench, leave: Callable[[str], None]
) -> None:
    """`auto` looks at the free memory, so the same command may stream today and not tomorrow."""
    leave(before)
    try:
        verbs.calibrate(DEMO, bench.options(after))
    except OutputError as error:
        assert "--no-resume" in error.command_line
        bench.finish_here(after, resume=False)
    bench.check_output()


def other_model(folder: Path) -> Path:
    """The demo model with one weight changed."""
    model = folder / "other"
    shutil.copytree(DEMO, model)
    shard = sorted(model.glob("*.safetensors"))[0]
    with shard.open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"\0\0")
    return model


OTHERS: dict[str, dict[str, Any]] = {
    "fewer-prompts": {"num_prompts": PROMPTS - 1},
    "shorter": {"max_length": 31},
    "batches": {"batch_size": 2},
    "all-experts": {"all_experts": True},
    "until-converged": {"until_converged": True},
}


@pytest.mark.parametrize("name", OTHERS)
def test_an_unfinished_calibration_with_other_options_is_refused_and_kept(
    name: str, bench: Bench, leave: Callable[[str], None]
) -> None:
    leave("off")
    with pytest.raises(OutputError, match="unfinished calibration with other") as caught:
        verbs.calibrate(DEMO, bench.options(**OTHERS[name]))
    assert "--no-resume" in caught.value.command_line
    assert len(str(caught.value).splitlines()) == 1
    seen: list[int] = []
    verbs.calibrate(DEMO, bench.options(), on_progress=lambda done, total: seen.append(done))
    assert len(seen) == PROMPTS - 5, "what was refused must leave the finished work as it is"
    bench.check_output()


@pytest.mark.parametrize("mode", MODES)
def test_an_unfinished_calibration_of_another_model_is_refused_and_no_resume_throws_it_away(
    mode: str, bench: Bench, leave: Callable[[str], None], tmp_path: Path
) -> None:
    leave(mode)
    model = other_model(tmp_path)
    with pytest.raises(OutputError, match="another model"):
        verbs.calibrate(model, bench.options(mode))
    verbs.calibrate(model, bench.options(mode, resume=False))
    assert [path.name for path in bench.folder.iterdir()] == [bench.output.name]
    assert bench.output.read_bytes() != bench.reference
    bench.finish_here(mode, overwrite=True)


def test_no_resume_begins_again(bench: Bench, leave: Callable[[str], None]) -> None:
    leave("off")
    ran = bench.run("off", "--no-resume", prelude="")
    bench.check_complete(ran)
    seen: list[int] = []
    bench.output.unlink()
    leave("on")
    verbs.calibrate(DEMO, bench.options("on", resume=False), on_progress=lambda done, total: seen.append(done))
    assert len(seen) == 5 * PROMPTS
    bench.check_output()


def test_the_command_line_ends_with_4_where_an_unfinished_calibration_is_something_else(
    bench: Bench, leave: Callable[[str], None]
) -> None:
    leave("off")
    ran = bench.run("off", "--batch-size", "2", prelude="")
    assert ran.code == 4
    bench.check_message(ran, "batch_size 1, now 2", "--no-resume")


# Other writers, and outputs that exist.


def test_two_writers_at_once_are_refused_and_the_first_one_is_not_disturbed(bench: Bench) -> None:
    running = bench.start("off")
    running.reach(3)
    with pytest.raises(OutputError, match="being written"):
        verbs.calibrate(DEMO, bench.options())
    bench.check_complete(running.end())


def test_the_second_writer_ends_with_4(bench: Bench) -> None:
    with Staging(bench.output):
        ran = bench.run("off", prelude="")
    assert ran.code == 4
    bench.check_message(ran, "being written by another fp8pack")


def test_an_output_that_is_complete_is_left_as_it_is(bench: Bench) -> None:
    bench.output.write_bytes(bench.reference)
    before = bench.output.stat()
    ran = bench.run("off", prelude="")
    bench.check_complete(ran)
    assert "already complete" in ran.stderr
    assert bench.finish_here("on").already_complete, "streamed or not, it is the same calibration"
    after = bench.output.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_what_an_earlier_run_left_beside_a_complete_output_goes(bench: Bench, leave: Callable[[str], None]) -> None:
    """As after a kill between the rename that commits and the removal of the staging directory."""
    leave("off")
    bench.output.write_bytes(bench.reference)
    shutil.rmtree(bench.staging / "output")
    bench.finish_here()


@pytest.mark.parametrize("name", OTHERS)
def test_an_output_of_other_options_is_refused_unless_it_is_to_be_replaced(name: str, bench: Bench) -> None:
    bench.output.write_bytes(bench.reference)
    with pytest.raises(OutputError, match="exists") as caught:
        verbs.calibrate(DEMO, bench.options(**OTHERS[name]))
    assert "--overwrite" in caught.value.command_line
    bench.check_output()


def test_an_output_that_is_no_calibration_is_refused_unless_it_is_to_be_replaced(bench: Bench) -> None:
    for content in (b"mine", next(DEMO.glob("*.safetensors")).read_bytes()):
        bench.output.write_bytes(content)
        with pytest.raises(OutputError, match="exists"):
            verbs.calibrate(DEMO, bench.options())
        assert bench.output.read_bytes() == content
    ran = bench.run("off", "--overwrite", prelude="")
    bench.check_complete(ran)


def test_overwrite_replaces_what_is_complete_too(bench: Bench) -> None:
    bench.output.write_bytes(bench.reference)
    before = bench.output.stat().st_ino
    assert not bench.finish_here(overwrite=True).already_complete
    assert bench.output.stat().st_ino != before


def test_a_directory_that_is_empty_is_not_replaced_by_a_file(bench: Bench) -> None:
    bench.output.mkdir()
    for overwrite in (False, True):
        with pytest.raises(OutputError):
            verbs.calibrate(DEMO, bench.options(overwrite=overwrite))
    assert bench.output.is_dir()


def test_an_output_that_appears_meanwhile_is_not_replaced(bench: Bench) -> None:
    running = bench.start("off")
    running.reach(3)
    bench.output.write_text("mine")
    ran = running.end()
    assert ran.code == 4
    bench.check_message(ran, "was created by somebody else")
    assert bench.output.read_text() == "mine"
    bench.output.unlink()
    bench.finish_here()


# No space.


@pytest.mark.parametrize(("mode", "limit"), [("off", 20_000), ("off", 300_000), ("on", 20_000), ("on", 250_000)])
def test_a_file_that_may_not_grow_further_ends_with_5_and_the_same_command_continues(
    mode: str, limit: int, bench: Bench
) -> None:
    limited = f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
    ran = bench.run(mode, prelude=SLOW + limited)
    assert ran.code == 5, ran.stderr
    bench.check_message(ran, "too large")
    assert not bench.output.exists()
    bench.finish_here(mode)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Return a function that mounts a file system of this size, or changes the size of the one it mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted: list[Path] = []

    def mount(size: int) -> Path:
        remount = ["remount"] if mounted else []
        options = ",".join([*remount, f"size={size}"])
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("mounting is not allowed here")
        mounted.append(disk)
        return disk

    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting needs root")
    yield mount
    if mounted:
        subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.parametrize(("mode", "size"), [("off", 60_000), ("off", 900_000), ("on", 60_000), ("on", 400_000)])
def test_a_disk_that_gets_full_ends_with_5_and_the_same_command_continues_with_more_space(
    mode: str, size: int, bench: Bench, small_disk: Callable[[int], Path]
) -> None:
    unchecked = "from fp8pack.calibration import calibrate as _m\n_m.check_space = lambda *_: None\n"
    bench.folder = small_disk(size)
    ran = bench.run(mode, prelude=SLOW + unchecked)
    assert ran.code == 5, ran.stderr
    bench.check_message(ran, "no space left")
    assert not bench.output.exists()
    small_disk(50 << 20)
    bench.finish_here(mode)


def test_a_disk_without_room_for_the_hidden_states_is_refused_before_any_work(
    bench: Bench, small_disk: Callable[[int], Path]
) -> None:
    bench.folder = small_disk(400_000)
    ran = bench.run("on", prelude="")
    assert ran.code == 5
    bench.check_message(ran, "free", "needed")
    assert list(bench.folder.iterdir()) == []
