"""What the machine grants this process: memory, and an end with its parent."""

from __future__ import annotations

import ctypes
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent() -> None:
    """Have the kernel kill this process when the one that started it ends, however that ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def measure_peak() -> int:
    """The process's largest resident memory so far, in bytes; pages of mapped files count while they are mapped."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def available_memory() -> int | None:
    """Bytes that can be had without swapping, under every limit that is set for this process; None if unknown."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    available = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    return min([available, *group_memory()])


def group_memory() -> Iterator[int]:
    """Bytes left in each control group that holds this process and has a limit; file caches count as free."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, group = line.split(":", 2)
        if not controllers:  # version 2
            root, names, cache = CGROUPS, ("memory.max", "memory.current"), "file"
        elif "memory" in controllers.split(","):
            root, names = CGROUPS / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
            cache = "total_cache"
        else:
            continue
        folder = root / group.lstrip("/")
        for place in (folder, *folder.parents):
            if root not in (place, *place.parents):
                break
            try:
                limit, used = ((place / name).read_text().strip() for name in names)
                stat = dict(entry.split() for entry in (place / "memory.stat").read_text().splitlines())
            except OSError:  # the root has no limit; a container may not see the groups around it
                continue
            if limit != "max":
                yield int(limit) - int(used) + int(stat[cache])
