"""What this process may use of the machine: processors, memory, disk. Containers count."""

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
    """Returns how many processors the process may keep busy, at least 1.

    A container may be held to a share of all of them (`cpu.max` of cgroup v2), which TensorFlow
    does not look at: it would start a thread for each processor of the host.
    """
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    count = len(affinity(0)) if affinity else os.cpu_count() or 1
    quota, _, period = _read(cgroup / "cpu.max").partition(" ")
    if quota.isdigit() and period.isdigit():
        count = min(count, -(-int(quota) // int(period)))
    return max(count, 1)


def free_memory(cgroup: Path = CGROUP) -> int:
    """Returns the bytes that can still be taken, of the machine and of the container's limit."""
    free = psutil.virtual_memory().available
    limit, used = _read(cgroup / "memory.max"), _read(cgroup / "memory.current")
    if limit.isdigit() and used.isdigit():
        statistics = dict(line.split() for line in _read(cgroup / "memory.stat").splitlines())
        reclaimable = int(statistics.get("inactive_file", 0))  # cached pages of files
        free = min(free, max(int(limit) - int(used) + reclaimable, 0))
    return free


def fits_in_memory(size: int) -> bool:
    """Tells whether so many bytes are at most half of what is free."""
    return size <= free_memory() // 2


@contextlib.contextmanager
def memory_limit(more: int) -> Iterator[None]:
    """Lets the process take so many bytes more than it has and no others: MemoryError beyond.

    Address space is what is limited, on Linux alone.
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
    """Returns the free bytes of the disk that a folder lies on, or would lie on; 0 if unknown."""
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
