"""Processors, memory and disk that this process may use, including container limits."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

if sys.platform != "win32":
    import resource

CGROUP = Path("/sys/fs/cgroup")


def processors(cgroup: Path = CGROUP) -> int:
    """Returns the number of processors that the process may use, at least 1.

    TensorFlow ignores the processor quota of a container (`cpu.max` of cgroup v2).
    """
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    count = len(affinity(0)) if affinity else os.cpu_count() or 1
    quota, _, period = _read(cgroup / "cpu.max").partition(" ")
    if quota.isdigit() and period.isdigit():
        count = min(count, -(-int(quota) // int(period)))
    return max(count, 1)


def free_memory(cgroup: Path = CGROUP) -> int:
    """Returns the free memory in bytes, of the machine and within the container's limit."""
    free = psutil.virtual_memory().available
    limit, used = _read(cgroup / "memory.max"), _read(cgroup / "memory.current")
    if limit.isdigit() and used.isdigit():
        statistics = dict(line.split() for line in _read(cgroup / "memory.stat").splitlines())
        reclaimable = int(statistics.get("inactive_file", 0))  # cached pages of files
        free = min(free, max(int(limit) - int(used) + reclaimable, 0))
    return free


def fits_in_memory(size: int) -> bool:
    """Returns whether `size` bytes are at most half of the free memory."""
    return size <= free_memory() // 2


@contextlib.contextmanager
def memory_limit(more: int) -> Iterator[None]:
    """Limits the block to `more` additional bytes; beyond them it raises a `MemoryError`.

    Limits the address space. Has no effect on systems other than Linux.
    """
    if not sys.platform.startswith("linux"):
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limits = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    limit = min([psutil.Process().memory_info().vms + more, *limits])
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def free_disk(folder: Path) -> int:
    """Returns the free bytes on the disk of a folder, which need not exist; 0 if unknown."""
    parents = (folder, *folder.absolute().parents)
    try:
        return shutil.disk_usage(next(parent for parent in parents if os.path.exists(parent))).free
    except OSError:
        return 0


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii").strip()
    except OSError:  # no such limit, or another system
        return ""
