"""What a control group leaves is all that may be used; the files are those of kernels with either version of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fp8pack.checkpoint.source import open_checkpoint
from fp8pack.errors import Fp8PackError
from fp8pack.machine import usable_cores, usable_memory

GB = 10**9
FREE = 900 * GB  # of the machine
CORES = len(os.sched_getaffinity(0))


class Machine:
    """The two mounts of a machine, as directories."""

    def __init__(self, folder: Path) -> None:
        self.root, self.proc = folder / "cgroup", folder / "proc"
        self.write(self.proc / "meminfo", f"MemTotal: 1 kB\nMemAvailable: {FREE // 1024} kB\n")

    def write(self, path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def member(self, *lines: str) -> None:
        self.write(self.proc / "self" / "cgroup", "".join(f"{line}\n" for line in lines))

    def v2(self, group: str, limit: str, used: int = 0, cache: int = 0, cpu: str = "max 100000") -> None:
        self.write(self.root / group / "memory.max", f"{limit}\n")
        self.write(self.root / group / "memory.current", f"{used}\n")
        self.write(self.root / group / "memory.stat", f"anon 1\ninactive_file {cache}\nactive_file 7\n")
        self.write(self.root / group / "cpu.max", f"{cpu}\n")

    def v1(self, group: str, limit: int, used: int = 0, cache: int = 0) -> None:
        self.write(self.root / "memory" / group / "memory.limit_in_bytes", f"{limit}\n")
        self.write(self.root / "memory" / group / "memory.usage_in_bytes", f"{used}\n")
        stat = f"inactive_file 5\ntotal_inactive_file {cache}\n"
        self.write(self.root / "memory" / group / "memory.stat", stat)

    def cfs(self, group: str, quota: int, period: int = 100_000) -> None:
        self.write(self.root / group / "cpu.cfs_quota_us", f"{quota}\n")
        self.write(self.root / group / "cpu.cfs_period_us", f"{period}\n")

    @property
    def memory(self) -> int:
        return usable_memory(self.root, self.proc)

    @property
    def cores(self) -> int:
        return usable_cores(self.root, self.proc)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """Return a machine with 900 GB free and no control groups."""
    return Machine(tmp_path)


def test_without_groups_it_is_what_the_kernel_has(machine: Machine) -> None:
    assert machine.memory == FREE // 1024 * 1024
    assert machine.cores == CORES


def test_a_container_that_sees_its_own_group_as_the_root(machine: Machine) -> None:
    machine.member("0::/")
    machine.v2("", str(32 * GB), used=10 * GB, cache=4 * GB)
    assert machine.memory == 26 * GB


def test_the_least_of_the_group_and_all_above_it(machine: Machine) -> None:
    machine.member("0::/kubepods/pod/main")
    machine.v2("kubepods", str(100 * GB), used=95 * GB)
    machine.v2("kubepods/pod", str(32 * GB), used=8 * GB)
    machine.v2("kubepods/pod/main", "max")
    assert machine.memory == 5 * GB
    machine.v2("kubepods", "max", used=95 * GB)
    assert machine.memory == 24 * GB


def test_a_group_above_its_limit_leaves_nothing(machine: Machine) -> None:
    machine.member("0::/")
    machine.v2("", str(GB), used=2 * GB)
    assert machine.memory == 0


def test_version_1(machine: Machine) -> None:
    machine.member("5:cpu,cpuacct:/job", "4:memory:/job/step", "1:name=systemd:/")
    machine.v1("", 0x7FFFFFFFFFFFF000, used=50 * GB)
    machine.v1("job", 64 * GB, used=20 * GB, cache=6 * GB)
    machine.v1("job/step", 0x7FFFFFFFFFFFF000, used=20 * GB)
    assert machine.memory == 50 * GB


def test_a_container_of_version_1_whose_path_is_that_of_the_host(machine: Machine) -> None:
    machine.member("4:memory:/docker/0123456789ab", "2:cpu,cpuacct:/docker/0123456789ab")
    machine.v1("", 16 * GB, used=GB)
    machine.cfs("cpu,cpuacct", 50_000)
    assert machine.memory == 15 * GB
    assert machine.cores == 1


def test_a_hybrid_has_memory_in_version_1_or_in_version_2(machine: Machine) -> None:
    machine.member("4:memory:/job", "0::/job")
    machine.v1("job", 16 * GB)
    assert machine.memory == 16 * GB
    machine.v2("unified/job", str(8 * GB))
    assert machine.memory == 8 * GB


@pytest.mark.parametrize("text", ["", "lots\n", "\n", "max\n"])
def test_what_cannot_be_read_limits_nothing(text: str, machine: Machine) -> None:
    machine.member("0::/")
    machine.v2("", text, cpu=text)
    assert machine.memory == FREE // 1024 * 1024
    assert machine.cores == CORES
    (machine.root / "memory.max").unlink()
    (machine.root / "memory.max").mkdir()  # reading it is an error
    assert machine.memory == FREE // 1024 * 1024


def test_a_limit_counts_even_if_what_is_used_cannot_be_read(machine: Machine) -> None:
    machine.member("0::/")
    machine.write(machine.root / "memory.max", f"{GB}\n")
    assert machine.memory == GB


def test_a_system_that_does_not_say_has_none(machine: Machine) -> None:
    (machine.proc / "meminfo").unlink()
    assert machine.memory == 0


@pytest.mark.parametrize("quota", ["50000 100000", "100000 100000", "1 100000"])
def test_a_part_of_a_processor_counts_as_one(quota: str, machine: Machine) -> None:
    machine.member("0::/a/b")
    machine.v2("a", "max", cpu=quota)
    machine.v2("a/b", "max")
    assert machine.cores == 1


def test_a_quota_is_rounded_up(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    machine.member("0::/a", "2:cpu:/a")
    assert machine.cores == 64
    machine.v2("a", "max", cpu="150000 100000")
    assert machine.cores == 2
    machine.v2("a", "max", cpu="max 100000")
    machine.cfs("cpu/a", 710_000)
    assert machine.cores == 8
    machine.cfs("cpu/a", -1)
    assert machine.cores == 64


# Other systems.


def run_on(system: str, code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a Python that believes to be elsewhere, after what reads its system has been imported."""
    elsewhere = f"import sys, fp8pack.cli.app; sys.platform = {system!r}; sys.modules['fcntl'] = None\n"
    return subprocess.run([sys.executable, "-c", elsewhere + code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_the_command_line_says_in_a_sentence_that_it_needs_linux(system: str) -> None:
    ran = run_on(system, "sys.argv = ['fp8pack', 'pack', 'model']; fp8pack.cli.app.main()")
    expected = f"fp8pack: fp8pack runs on Linux only, and this is {system}: use a Linux machine, or WSL 2\n"
    assert (ran.returncode, ran.stdout, ran.stderr) == (1, "", expected)


@pytest.mark.parametrize("name", ["pack", "load_packed", "observe", "PackResult"])
def test_the_public_names_say_so_too(name: str) -> None:
    code = f"""
try:
    fp8pack.{name}
except fp8pack.Fp8PackError as error:
    print(error)
"""
    ran = run_on("darwin", code)
    assert ran.stderr == ""
    assert ran.stdout.startswith("fp8pack runs on Linux only, and this is darwin")


def test_what_is_imported_from_its_own_module_says_so_when_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(Fp8PackError, match="Linux only"):
        open_checkpoint(Path("model"))
