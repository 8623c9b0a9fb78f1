"""What this process may use of its machine: what the kernel has free, or less where a control group says so.

A limit of a group counts for all groups below it. Version 2 keeps all limits in one tree, version 1 a tree for each
controller, and a hybrid has both. A container often sees its own group as the root of the tree.
"""

import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from fp8pack.errors import Fp8PackError

_CGROUPS, _PROC = Path("/sys/fs/cgroup"), Path("/proc")
_MEMORY_FILES = (  # limit, usage, and the file cache that the kernel takes back first: version 2, version 1
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def check_system() -> None:
    """Raise Fp8PackError on another system than Linux, whose locks, reservations and reads fp8pack relies on."""
    if sys.platform != "linux":
        raise Fp8PackError(f"fp8pack runs on Linux only, and this is {sys.platform}", "use a Linux machine, or WSL 2")


def usable_memory(root: Path = _CGROUPS, proc: Path = _PROC) -> int:
    """Return the bytes that this process can still take without swapping; 0 where the system does not say.

    root, proc: where the control groups and the kernel's tables are mounted.
    """
    limits = [left for group in _groups("memory", root, proc) for left in _memory_left(group)]
    return min([_fields(proc / "meminfo").get("MemAvailable", 0) * 1024, *limits])


def usable_cores(root: Path = _CGROUPS, proc: Path = _PROC) -> int:
    """Return how many threads of this process can run at once, a part of a processor counted as a whole; at least 1.

    root, proc: as in `usable_memory`.
    """
    shares = [share for group in _groups("cpu", root, proc) for share in _cpu_shares(group)]
    return max(1, min([len(os.sched_getaffinity(0)), *shares]))


def _groups(controller: str, root: Path, proc: Path) -> Iterator[Path]:
    """The directories of the groups that this process is in, and of all above them; some may not exist."""
    for line in _text(proc / "self" / "cgroup").splitlines():
        _, names, path = line.split(":", 2)
        if names and controller not in names.split(","):
            continue
        below = Path(path.strip("/"))
        for mount in (root / names, root / controller) if names else (root, root / "unified"):
            yield from (mount / part for part in (below, *below.parents))


def _memory_left(group: Path) -> Iterator[int]:
    for limit_file, usage_file, cache in _MEMORY_FILES:
        limit, usage = _numbers(group / limit_file), _numbers(group / usage_file)
        if limit:
            used = sum(usage) - _fields(group / "memory.stat").get(cache, 0)
            yield max(0, limit[0] - max(0, used))


def _cpu_shares(group: Path) -> Iterator[int]:
    quota_of_v1 = _numbers(group / "cpu.cfs_quota_us") + _numbers(group / "cpu.cfs_period_us")
    for quota in (_numbers(group / "cpu.max"), quota_of_v1):
        if len(quota) == 2 and quota[0] > 0 and quota[1] > 0:
            yield math.ceil(quota[0] / quota[1])


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _numbers(path: Path) -> list[int]:
    """The numbers of a small file; `max` is none."""
    return [int(word) for word in _text(path).split() if word.lstrip("-").isdecimal()]


def _fields(path: Path) -> dict[str, int]:
    """The numbers of a file whose lines begin with their names."""
    lines = [line.replace(":", " ").split() for line in _text(path).splitlines()]
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdecimal()}
