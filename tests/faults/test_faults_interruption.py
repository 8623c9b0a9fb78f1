"""Whatever ends a pack, the same command goes on, ends in the same bytes, and leaves nothing behind."""

import errno
import json
import os
import random
import resource
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

import fp8pack
from fp8pack.checkpoint.journal import BandResult, Journal
from fp8pack.checkpoint.staging import Staging
from fp8pack.errors import Fp8PackError, InputError, OutputError, SpaceError
from fp8pack.packing.options import WriteOptions
from fp8pack.packing.prepare import prepare_pack
from fp8pack.packing.write import carry_out
from fp8pack.planning.recipe import Request

pytestmark = pytest.mark.slow

BANDS = 128  # the journal has a line for each, and some more
KILLS = random.Random(20).sample(range(2, BANDS), 8)
# Workers that no machine makes fast enough: a deadline comes in the middle.
SLOWER = """
import time
write = os.pwrite
os.pwrite = lambda *arguments: (time.sleep(0.02), write(*arguments))[1]
"""


# Killed.


@pytest.mark.parametrize("lines", KILLS)
def test_a_pack_killed_at_a_random_moment_continues_to_the_same_bytes(lines: int, bench: Any) -> None:
    bench.leave_unfinished(lines=lines)
    ran = bench.run()
    bench.check_complete(ran)
    assert ran.facts["resumed_nbytes"] > 0


def test_a_pack_killed_again_and_again_continues_to_the_same_bytes(bench: Any) -> None:
    for lines in (20, 60):
        bench.leave_unfinished(lines=lines)
    bench.check_complete(bench.run())


def test_a_pack_that_was_killed_continues_with_another_number_of_workers(bench: Any) -> None:
    bench.leave_unfinished(lines=40)
    bench.check_complete(bench.run("--workers", "1"))


@pytest.mark.parametrize("place", [0.0, 0.2, 0.4, 0.6, *range(-14, 0)])
def test_a_pack_killed_before_a_change_of_the_file_system_is_absent_or_whole_and_continues(
    place: float, num_changes: int, small_bench: Any, die_at: Callable[[int], str]
) -> None:
    """A fraction counts from the start; a negative number from the end, where metadata is written and committed."""
    at = 1 + num_changes + int(place) if place < 0 else 1 + int(place * num_changes)
    assert small_bench.run(extra=die_at(at)).code == -signal.SIGKILL
    if small_bench.output.exists():
        small_bench.check_output()
    small_bench.finish_here()


@pytest.mark.parametrize("from_the_end", range(1, 33, 4))
def test_a_replacement_killed_anywhere_leaves_the_old_output_or_the_new_one(
    from_the_end: int, replacing: Any, small_bench: Any, die_at: Callable[[int], str]
) -> None:
    shutil.copytree(replacing.before, small_bench.output)
    at = 1 + replacing.num_changes - from_the_end
    assert small_bench.run("--overwrite", extra=die_at(at)).code == -signal.SIGKILL
    visible = small_bench.output if small_bench.output.exists() else small_bench.old
    found = json.loads((visible / "fp8pack.json").read_bytes())
    assert found["root"] in (replacing.root, json.loads(small_bench.reference["fp8pack.json"])["root"])
    for name, entry in found["files"].items():
        assert (visible / name).stat().st_size == entry["size"]
    small_bench.finish_here(overwrite=True)


# Asked to stop.


STOPS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]


@pytest.mark.parametrize(("signum", "code"), STOPS, ids=[signum.name for signum, _ in STOPS])
@pytest.mark.parametrize("lines", [1, 60])
def test_a_pack_that_is_asked_to_stop_says_so_and_continues(
    signum: signal.Signals, code: int, lines: int, bench: Any
) -> None:
    running = bench.start("-q")
    assert running.reach(lines)
    running.process.send_signal(signum)
    ended = running.end()
    assert ended.code == code
    bench.check_message(ended, "the same command continues")
    assert not bench.output.exists()
    ran = bench.run("-q")
    bench.check_complete(ran)
    assert lines == 1 or ran.facts["resumed_nbytes"] > 0


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("milliseconds", [60, 120, 200, 300, 450, 700])
def test_a_signal_at_any_moment_leaves_no_traceback(
    signum: signal.Signals, milliseconds: int, small_bench: Any
) -> None:
    command = [sys.executable, "-m", "fp8pack", "pack", str(small_bench.model), "-o", str(small_bench.output), "-q"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        time.sleep(milliseconds / 1000)
        process.send_signal(signum)
        _, errors = process.communicate()
    assert "/cli/" not in errors, "our code has begun"
    by_python = {1} if "KeyboardInterrupt" in errors else set()  # which was not there yet when the signal came
    assert process.returncode in {0, -signum, 128 + signum} | by_python
    if small_bench.output.exists():  # the signal came after the commit
        assert fp8pack.verify(small_bench.output).ok
    small_bench.check_complete(small_bench.run())


def test_a_hangup_that_is_ignored_stays_so(bench: Any) -> None:
    running = bench.start("-q", extra="import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n")
    assert running.reach(1)
    running.process.send_signal(signal.SIGHUP)
    bench.check_complete(running.end())


def test_a_deadline_ends_with_code_7_and_the_same_command_continues(bench: Any) -> None:
    ended = bench.run("--deadline", "0.3s", extra=SLOWER)
    assert ended.code == 7
    bench.check_message(ended, "the same command continues")
    assert not bench.output.exists()
    ran = bench.run()
    bench.check_complete(ran)
    assert ran.facts["resumed_nbytes"] > 0


def test_a_pack_under_one_short_deadline_after_the_other_gets_done(bench: Any) -> None:
    codes = []
    while not codes or codes[-1] == 7:
        ran = bench.run("--deadline", "0.3s", extra=SLOWER)
        codes.append(ran.code)
        assert len(codes) < 20
    bench.check_complete(ran)
    assert len(codes) > 1


def test_a_pack_whose_reader_went_away_is_complete_all_the_same(small_bench: Any) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    ended = small_bench.run(stdout=write_end)
    os.close(write_end)
    assert ended.code == 128 + signal.SIGPIPE
    small_bench.check_output()


# Two at a time.


def test_of_two_packs_into_one_output_one_wins_and_the_other_is_refused(bench: Any) -> None:
    first = bench.start()
    assert first.reach(10)
    first.process.send_signal(signal.SIGSTOP)
    second = bench.run()
    first.process.send_signal(signal.SIGCONT)
    assert second.code == 4
    bench.check_message(second, "another fp8pack")
    bench.check_complete(first.end())


@pytest.mark.parametrize("attempt", range(2))
def test_two_packs_that_start_together_never_fail_in_another_way(attempt: int, small_bench: Any) -> None:
    ends = [running.end() for running in [small_bench.start() for _ in range(2)]]
    codes = [ran.code for ran in ends]
    assert 0 in codes
    assert set(codes) <= {0, 4}
    small_bench.check_output()
    small_bench.check_tidy()


def test_a_staging_directory_that_vanishes_while_it_is_entered_is_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other process commits between our mkdir and our open."""
    staging = Staging(tmp_path / "out")
    genuine = os.open

    def late_open(path: Any, *arguments: Any, **options: Any) -> int:
        if Path(os.fsdecode(path)).name == "lock":
            monkeypatch.setattr(os, "open", genuine)
            shutil.rmtree(staging.folder)
        return genuine(path, *arguments, **options)

    monkeypatch.setattr(os, "open", late_open)
    try:
        with staging:
            assert staging.content.is_dir()
    except OutputError:
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_pack_that_waited_while_another_finished_leaves_its_output_and_nothing_else(
    small_bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other process commits after we saw no output and before we take the lock."""
    prepared = prepare_pack(small_bench.model, Request(), WriteOptions(output=small_bench.output))
    genuine = Staging.__enter__

    def late_enter(staging: Staging) -> Staging:
        monkeypatch.setattr(Staging, "__enter__", genuine)
        assert small_bench.run().code == 0
        return genuine(staging)

    monkeypatch.setattr(Staging, "__enter__", late_enter)
    try:
        carry_out(prepared)
    except OutputError as error:
        assert len(str(error).splitlines()) == 1
    small_bench.check_output()
    small_bench.check_tidy()


# Not the same command.


def test_an_unfinished_pack_of_another_recipe_is_refused_and_kept(bench: Any) -> None:
    bench.leave_unfinished()
    ended = bench.run("--scheme", "FP8_BLOCK")
    assert ended.code == 4
    bench.check_message(ended, "another recipe", "--no-resume")
    bench.check_complete(bench.run())


def test_an_unfinished_pack_of_another_checkpoint_is_refused_and_kept(
    bench: Any, write_other_model: Callable[..., Path], tmp_path: Path
) -> None:
    bench.leave_unfinished()
    other = write_other_model(tmp_path / "other", shards=1, layers=1, size=128)
    ended = bench.run(model=other)
    assert ended.code == 4
    bench.check_message(ended, "another checkpoint", "--no-resume")
    bench.check_complete(bench.run())


def test_no_resume_replaces_an_unfinished_pack_of_another_recipe(bench: Any) -> None:
    bench.leave_unfinished("--scheme", "FP8_BLOCK")
    ran = bench.run("--no-resume")
    bench.check_complete(ran)
    assert ran.facts["resumed_nbytes"] == 0


def test_an_unfinished_pack_whose_shards_were_removed_is_made_anew(bench: Any) -> None:
    bench.leave_unfinished()
    for path in (bench.staging / "output").glob("*.safetensors"):
        path.unlink()
    bench.check_complete(bench.run())


def test_a_file_that_left_the_source_since_the_interruption_is_not_in_the_output(
    small_bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    shutil.copytree(small_bench.model, model)
    (model / "secret.txt").write_text("secret")
    options = WriteOptions(output=small_bench.output)

    def interrupted(staging: Staging, *, overwrite: bool) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Staging, "commit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            verbs.pack(model, Request(), options)
    (model / "secret.txt").unlink()
    verbs.pack(model, Request(), options)
    small_bench.check_output()


def test_a_complete_output_is_left_as_it_is(small_bench: Any) -> None:
    small_bench.check_complete(small_bench.run())
    before = {path.name: path.stat().st_mtime_ns for path in small_bench.output.iterdir()}
    ran = small_bench.run()
    small_bench.check_complete(ran)
    assert ran.facts["already_complete"]
    assert {path.name: path.stat().st_mtime_ns for path in small_bench.output.iterdir()} == before


def test_an_output_that_lost_a_file_is_not_called_complete(small_bench: Any) -> None:
    assert small_bench.run().code == 0
    (small_bench.output / "tokenizer.json").unlink()
    ended = small_bench.run()
    assert ended.code == 4
    small_bench.check_message(ended, "--overwrite")
    small_bench.check_complete(small_bench.run("--overwrite"))


# Replacing an output.


def test_overwrite_replaces_an_output_whole(small_bench: Any) -> None:
    small_bench.output.mkdir()
    (small_bench.output / "old.safetensors").write_text("old")
    (small_bench.output / "stale.txt").write_text("stale")
    refused = small_bench.run()
    assert refused.code == 4
    small_bench.check_message(refused, "--overwrite")
    assert {path.name for path in small_bench.output.iterdir()} == {"old.safetensors", "stale.txt"}
    small_bench.check_complete(small_bench.run("--overwrite"))


def test_overwrite_leaves_a_directory_alone_that_is_no_checkpoint(small_bench: Any) -> None:
    small_bench.output.mkdir()
    (small_bench.output / "letters.txt").write_text("dear")
    refused = small_bench.run("--overwrite")
    assert refused.code == 4
    small_bench.check_message(refused, "not a checkpoint")
    assert [path.name for path in small_bench.output.iterdir()] == ["letters.txt"]


def leave_old(bench: Any) -> None:
    """Leave an old output where a file system without an exchange has it between two renames."""
    bench.old.mkdir()
    (bench.old / "old.safetensors").write_text("old")
    (bench.old / "stale.txt").write_text("stale")


def test_a_swap_that_was_cut_off_after_its_first_rename_is_repaired(small_bench: Any) -> None:
    leave_old(small_bench)
    small_bench.check_complete(small_bench.run("--overwrite"))


def test_a_swap_that_was_cut_off_after_its_second_rename_is_repaired_by_the_same_command(small_bench: Any) -> None:
    assert small_bench.run().code == 0
    leave_old(small_bench)
    small_bench.check_complete(small_bench.run("--overwrite"))


def test_what_a_commit_that_was_cut_off_left_beside_a_complete_output_is_removed(small_bench: Any) -> None:
    assert small_bench.run().code == 0
    leave_old(small_bench)
    small_bench.staging.mkdir()
    (small_bench.staging / "journal.jsonl").write_text("")
    small_bench.check_complete(small_bench.run())


def test_a_swap_that_was_cut_off_gives_the_old_output_back_when_nothing_is_to_be_replaced(small_bench: Any) -> None:
    leave_old(small_bench)
    ended = small_bench.run()
    assert ended.code == 4
    assert (small_bench.output / "stale.txt").read_text() == "stale"
    small_bench.check_message(ended, "--overwrite")


NO_EXCHANGE = """
from fp8pack.checkpoint import staging
staging.exchange = lambda one, other: False
"""
FAILING_SECOND = """
import errno
from pathlib import Path
rename = Path.rename
def failing(self, target):
    if self.name == "output":
        raise OSError(errno.EIO, "Input/output error", str(self))
    return rename(self, target)
Path.rename = failing
"""
FAILING_REMOVAL = """
import errno
import shutil
remove = shutil.rmtree
def failing(path, *args, **options):
    if str(path).endswith("-old"):
        raise OSError(errno.EIO, "Input/output error", str(path))
    return remove(path, *args, **options)
shutil.rmtree = failing
"""


def test_where_nothing_can_be_exchanged_an_output_is_replaced_by_two_renames(small_bench: Any) -> None:
    leave_old(small_bench)
    small_bench.old.rename(small_bench.output)
    small_bench.check_complete(small_bench.run("--overwrite", extra=NO_EXCHANGE))


def test_an_old_output_comes_back_when_the_second_rename_fails(small_bench: Any) -> None:
    leave_old(small_bench)
    small_bench.old.rename(small_bench.output)
    ended = small_bench.run("--overwrite", extra=NO_EXCHANGE + FAILING_SECOND)
    assert ended.code == 5
    assert (small_bench.output / "stale.txt").read_text() == "stale"
    assert not small_bench.old.exists()
    small_bench.check_complete(small_bench.run("--overwrite"))


def test_what_fails_after_the_commit_is_a_note(small_bench: Any) -> None:
    leave_old(small_bench)
    small_bench.old.rename(small_bench.output)
    ended = small_bench.run("--overwrite", extra=NO_EXCHANGE + FAILING_REMOVAL)
    assert ended.code == 0
    assert "is complete, but what was left could not be removed: input/output error" in str(ended.facts)
    small_bench.check_output()


# Locks.


def leave_lock(bench: Any, text: bytes, *, age: float = 0.0) -> None:
    """Leave a lock file of this age, as a machine that shares the disk would."""
    bench.staging.mkdir()
    lock = bench.staging / "lock"
    lock.write_bytes(text)
    then = time.time() - age
    os.utime(lock, (then, then))


ELSEWHERE = json.dumps({"host": "another-host", "pid": 1}).encode()


def test_a_lock_of_a_clock_ahead_names_the_way_out(small_bench: Any) -> None:
    leave_lock(small_bench, ELSEWHERE, age=-86_400.0)
    ended = small_bench.run()
    assert ended.code == 4
    small_bench.check_message(ended, f"remove {small_bench.staging / 'lock'}")
    (small_bench.staging / "lock").unlink()
    small_bench.finish_here()


def test_a_young_lock_of_another_host_is_respected(small_bench: Any) -> None:
    leave_lock(small_bench, ELSEWHERE, age=60.0)
    ended = small_bench.run()
    assert ended.code == 4
    small_bench.check_message(ended, "another-host")
    assert not small_bench.output.exists()


def test_an_old_lock_of_another_host_is_taken_over_with_a_note(small_bench: Any) -> None:
    leave_lock(small_bench, ELSEWHERE, age=600.0)
    ran = small_bench.run()
    small_bench.check_complete(ran)
    assert "note     took over the lock that another-host left" in ran.stderr


@pytest.mark.parametrize("text", [b"\0" * 40, b'{"host": "anoth', b"[]", b"\xff"], ids=["nul", "torn", "list", "bytes"])
def test_a_lock_that_cannot_be_read_is_taken_over_or_refused(text: bytes, small_bench: Any) -> None:
    leave_lock(small_bench, text, age=600.0)
    try:
        small_bench.finish_here()
    except OutputError as error:
        assert len(str(error).splitlines()) == 1


# The journal.


@pytest.mark.parametrize("torn", [b'{"shard":"model-0', b"\0" * 300, b'{"done":"model-00001-of-00004.safetensors"'])
def test_a_torn_last_line_of_the_journal_is_cut_off(torn: bytes, bench: Any) -> None:
    bench.leave_unfinished(lines=30)
    with bench.journal.open("ab") as file:
        file.write(torn)
    ran = bench.run()
    bench.check_complete(ran)
    assert ran.facts["resumed_nbytes"] > 0


DAMAGE = {
    "text": b"not json",
    "list": b"[]",
    "short-row": b'{"shard":"x","plan":"y","bands":[[1]]}',
    "row-of-numbers": b'{"shard":"x","plan":"y","bands":[5]}',
    "amax-of-text": b'{"amax":{"x":"y"}}',
    "bytes": b"\xff\0",
    "empty": b"",
}


@pytest.mark.parametrize("line", DAMAGE.values(), ids=DAMAGE.keys())
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_damaged_line_of_the_journal_is_no_traceback(place: int, line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    lines = [b'{"journal":1,"source":"blake3:0"}', b'{"shard":"a","plan":"b","bands":[["t",0,"d","",0.0,0.0,0.0]]}']
    path.write_bytes(b"\n".join([*lines[:place], line, *lines[place + (place == 0) :]]) + b"\n")
    journal = Journal(path)
    try:
        journal.read()
    except OutputError as error:
        assert "--no-resume" in error.command_line
    finally:
        journal.close()


@pytest.mark.parametrize("place", [0, 10])
def test_a_damaged_journal_is_never_believed(place: int, bench: Any) -> None:
    bench.leave_unfinished(lines=30)
    lines = bench.journal.read_bytes().split(b"\n")
    lines[place] = b"not json"
    bench.journal.write_bytes(b"\n".join(lines))
    ran = bench.run()
    if ran.code == 4:
        bench.check_message(ran, "--no-resume")
        ran = bench.run("--no-resume")
    bench.check_complete(ran)


def test_a_line_that_could_not_be_written_whole_does_not_spoil_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.start("source", {})
    genuine, calls = os.write, iter((True, False))

    def full_disk(fd: int, data: bytes) -> int:
        if next(calls):
            return genuine(fd, bytes(data)[:20])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full_disk)
        with pytest.raises(SpaceError):
            journal.add_bands("a", "plan", [BandResult("x", 0, b"digest")])
    journal.add_bands("b", "plan", [BandResult("y", 0, b"digest")])
    journal.close()
    again = Journal(tmp_path / "journal.jsonl")
    head, progress = again.read()
    again.close()
    assert head["source"] == "source"
    assert set(progress.bands) <= {("b", "plan")}


# No space, no permission, no source.


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Return a function that mounts a disk of a size in bytes, or changes it; skip where that is not allowed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = []

    def mount(size: int, *options: str) -> Path:
        flags = ",".join([*(["remount"] if mounted else []), f"size={size}", *options])
        ran = subprocess.run(["mount", "-t", "tmpfs", "-o", flags, "none", disk], capture_output=True, check=False)
        if ran.returncode:
            pytest.skip("mounting is not allowed here")
        mounted.append(disk)
        return disk

    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting needs root")
    yield mount
    if mounted:
        subprocess.run(["umount", "-l", disk], check=True)


def move(bench: Any, folder: Path) -> Any:
    """Return the bench with its output in another directory."""
    return type(bench)(bench.model, folder / "out", bench.reference, bench.prelude)


def test_a_disk_that_is_too_small_is_refused_before_any_work_and_a_larger_one_will_do(
    bench: Any, small_disk: Callable[..., Path]
) -> None:
    bench = move(bench, small_disk(8 << 20))
    ended = bench.run()
    assert ended.code == 5
    bench.check_message(ended, "free")
    assert not bench.output.exists()
    small_disk(200 << 20)
    bench.check_complete(bench.run())


@pytest.mark.parametrize("size", [100_000, 30 << 20])
def test_a_disk_that_gets_full_ends_with_code_5_and_the_same_command_continues_with_more_space(
    size: int, bench: Any, small_disk: Callable[..., Path]
) -> None:
    bench = move(bench, small_disk(size))
    unchecked = "\nfrom fp8pack.packing import write\nwrite.check_space = lambda *_: None\n"
    ended = bench.run(extra=unchecked)
    assert ended.code == 5
    bench.check_message(ended, "no space left", "the same command continues")
    assert not bench.output.exists()
    small_disk(200 << 20)
    bench.check_complete(bench.run())


def test_a_disk_that_is_full_to_the_last_byte_ends_with_code_5(
    small_bench: Any, small_disk: Callable[..., Path]
) -> None:
    folder = small_disk(1 << 20)
    bench = move(small_bench, folder)
    with (folder / "filler").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(bytes(4096))
    ended = bench.run()
    assert ended.code == 5
    bench.check_message(ended)
    (folder / "filler").unlink()
    bench.check_complete(bench.run())


def test_a_disk_that_is_read_only_ends_with_code_5(small_bench: Any, small_disk: Callable[..., Path]) -> None:
    bench = move(small_bench, small_disk(64 << 20, "ro"))
    ended = bench.run()
    assert ended.code == 5
    bench.check_message(ended, "not writable")


@pytest.mark.parametrize("limit", [1 << 20, 30_000])
def test_a_file_that_may_not_grow_further_ends_with_code_5_and_the_same_command_continues(
    limit: int, bench: Any
) -> None:
    ended = bench.run(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert ended.code == 5
    bench.check_message(ended, "too large")
    assert not bench.output.exists()
    bench.check_complete(bench.run())


@pytest.mark.parametrize(
    ("call", "nth", "number"),
    [
        ("pwrite", 1, errno.ENOSPC),
        ("pwrite", 2, errno.ENOSPC),
        ("pwrite", 5, errno.EIO),
        ("write", 1, errno.EDQUOT),
        ("write", 2, errno.ENOSPC),
        ("ftruncate", 1, errno.EIO),
        ("ftruncate", 3, errno.ENOSPC),
        ("fdatasync", 1, errno.EIO),
        ("fdatasync", 2, errno.EIO),
        ("fdatasync", 9, errno.ENOSPC),
        ("fsync", 1, errno.EIO),
        ("fsync", 2, errno.EIO),
        ("fsync", 3, errno.EIO),
        ("mkdir", 1, errno.EROFS),
        ("mkdir", 2, errno.ENOSPC),
        ("mkdir", 3, errno.ENOSPC),
        ("rename", 1, errno.EACCES),
    ],
)
def test_a_call_that_fails_once_is_one_line_and_never_taken_for_success(
    call: str, nth: int, number: int, small_bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = WriteOptions(output=small_bench.output, workers=1)
    genuine, seen = getattr(os, call), []

    def failing(*arguments: Any, **keywords: Any) -> Any:
        seen.append(arguments)
        if len(seen) == nth:
            raise OSError(number, os.strerror(number))
        return genuine(*arguments, **keywords)

    with monkeypatch.context() as patched:
        patched.setattr(os, call, failing)
        with pytest.raises(Fp8PackError) as caught:
            verbs.pack(small_bench.model, Request(), options)
    assert len(seen) >= nth
    assert type(caught.value) is SpaceError
    assert len(str(caught.value).splitlines()) == 1
    assert not small_bench.output.exists() or (call, nth) == ("fsync", 3)  # the sync after the commit
    small_bench.finish_here()


def test_a_source_that_became_shorter_is_refused_and_nothing_is_committed(small_bench: Any, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(small_bench.model, model)
    prepared = prepare_pack(model, Request(), WriteOptions(output=small_bench.output))
    shard = next(model.glob("*.safetensors"))
    os.truncate(shard, shard.stat().st_size - 100)
    with pytest.raises(InputError, match=shard.name):
        carry_out(prepared)
    assert not small_bench.output.exists()


def test_a_source_that_lost_a_shard_is_refused_and_nothing_is_committed(small_bench: Any, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(small_bench.model, model)
    prepared = prepare_pack(model, Request(), WriteOptions(output=small_bench.output))
    shard = next(model.glob("*.safetensors"))
    shard.unlink()
    with pytest.raises(InputError, match=shard.name):
        carry_out(prepared)
    assert not small_bench.output.exists()


def test_a_source_that_changed_since_the_interruption_is_taken_for_another_checkpoint(
    bench: Any, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(bench.model, model)
    bench.leave_unfinished(model=model)
    shard = next(model.glob("*.safetensors"))
    with shard.open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"\x01\x02")
    ended = bench.run(model=model)
    assert ended.code == 4
    bench.check_message(ended, "another checkpoint")


def test_the_source_is_never_written_to(small_bench: Any) -> None:
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in small_bench.model.rglob("*")}
    assert small_bench.run().code == 0
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in small_bench.model.rglob("*")} == before


@pytest.mark.parametrize("descriptors", [12, 32])
def test_few_descriptors_are_enough(descriptors: int, small_bench: Any) -> None:
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({descriptors}, {descriptors}))\n"
    small_bench.check_complete(small_bench.run(extra=limit))


def test_too_little_memory_for_a_thread_is_a_sentence(small_bench: Any) -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_DATA, (100 << 20, 100 << 20))\n"
    ended = small_bench.run(extra=limit)
    assert "Traceback" not in ended.stderr  # whatever a library says and does, that finds no memory


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
@pytest.mark.parametrize("milliseconds", [80, 300, 500, 700])
def test_a_repair_under_any_signal_ends_in_the_same_bytes(
    signum: signal.Signals, milliseconds: int, small_bench: Any
) -> None:
    small_bench.check_complete(small_bench.run())
    output = small_bench.output
    before = {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}
    for name in ("config.json", *(path.name for path in output.glob("*.safetensors"))):
        data = bytearray(before[name])
        data[-9] ^= 1
        (output / name).write_bytes(data)
    words = ["verify", str(output), "--against", str(small_bench.model), "--repair"]
    command = [sys.executable, "-m", "fp8pack", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        time.sleep(milliseconds / 1000)
        process.send_signal(signum)
        _, errors = process.communicate()
    assert "/cli/" not in errors, "our code has begun"
    assert process.returncode in {0, -signum, 128 + signum} | ({1} if "KeyboardInterrupt" in errors else set())
    assert fp8pack.verify(output, against=small_bench.model, repair=True).ok
    assert {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()} == before
