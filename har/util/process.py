"""Memory and start of this process."""

import resource
import sys
from pathlib import Path

import psutil

# What a container may take, where it has a limit (control groups, version 2).
CONTROL_GROUP = Path("/sys/fs/cgroup")


def free_memory() -> int:
    """Bytes of RAM that this process may still take: of the machine, or of its container."""
    free = int(psutil.virtual_memory().available)
    try:
        limit = int((CONTROL_GROUP / "memory.max").read_text())
        used = int((CONTROL_GROUP / "memory.current").read_text())
        lines = (CONTROL_GROUP / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):  # no container, or "max": no limit
        return free
    # cached files count as used, but are freed on demand
    cached = int(dict(line.split() for line in lines)["inactive_file"])
    return max(0, min(free, limit - used + cached))


def peak_memory_mb() -> float:
    """The most RAM this process has held, in 10^6 bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def process_start() -> float:
    """When this process began, in seconds since the epoch: its imports are waiting time too."""
    return float(psutil.Process().create_time())
