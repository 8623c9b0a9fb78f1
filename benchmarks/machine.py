"""What the benchmark ran on: hardware, file systems, versions."""

import platform
import shutil
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from fp8pack.machine import usable_cores, usable_memory

PACKAGES = ("fp8pack", "numpy", "numba", "llvmlite", "torch", "safetensors", "blake3", "ml_dtypes")
PEER_PACKAGES = ("llmcompressor", "compressed-tensors", "torch")


def hardware(folders: Sequence[Path]) -> dict[str, str]:
    """Return processor, memory, kernel, and the file systems that these directories lie on."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    facts = dict(line.partition(":")[::2] for line in cpuinfo.splitlines() if ":" in line)
    cpu = {key.strip(): value.strip() for key, value in facts.items()}
    wide = [name for name in ("avx2", "avx512f", "avx512_bf16", "asimd", "sve") if name in cpuinfo.split()]
    return {
        "CPU": f"{cpu.get('model name', platform.machine())} ({', '.join(wide)})",
        "Cores": str(usable_cores()),
        "RAM": f"{_meminfo('MemTotal') / 2**30:.1f} GiB",
        "Kernel": f"{platform.system()} {platform.release().partition('-')[0]}",
        "File systems": ", ".join(dict.fromkeys(file_system(folder) for folder in folders)),
    }


def versions(peer_python: Path) -> dict[str, str]:
    """Return the versions of everything that was measured, and of the peer if its environment is there."""
    found = {"Python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    copy = subprocess.run(["cp", "--version"], capture_output=True, text=True, check=False).stdout
    found["cp"] = copy.splitlines()[0].removeprefix("cp ") if copy else "unknown"
    if peer_python.exists():
        code = (
            f"from importlib.metadata import version; print(*(n + ' ' + version(n) for n in {PEER_PACKAGES}), sep=', ')"
        )
        peer = subprocess.run([peer_python, "-c", code], capture_output=True, text=True, check=False)
        found["peer"] = peer.stdout.strip()
    return found


def free_nbytes(folder: Path) -> int:
    """Return what may be written below a directory: on tmpfs no more than the memory that is available."""
    free = shutil.disk_usage(folder).free
    return min(free, usable_memory()) if file_system(folder) == "tmpfs" else free


def file_system(folder: Path) -> str:
    """Return the type of the file system that a directory lies on."""
    best, found = -1, "unknown"
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, mounted, kind = line.split()[:3]
        if folder.resolve().is_relative_to(mounted) and len(mounted) > best:
            best, found = len(mounted), kind
    return found


def _meminfo(key: str) -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))
