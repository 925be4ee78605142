"""Memory and start time of this process."""

import resource
import sys
from pathlib import Path

import psutil

# Where Linux states the memory limit of a container (control groups, version 2).
CONTROL_GROUP = Path("/sys/fs/cgroup")


def free_memory() -> int:
    """Return the bytes of RAM that this process, or its container, may still allocate."""
    free = int(psutil.virtual_memory().available)
    try:
        limit = int((CONTROL_GROUP / "memory.max").read_text())
        used = int((CONTROL_GROUP / "memory.current").read_text())
        lines = (CONTROL_GROUP / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):  # not in a container, or its limit is "max"
        return free
    # cached files count as used, but the kernel frees them on demand
    cached = int(dict(line.split() for line in lines)["inactive_file"])
    return max(0, min(free, limit - used + cached))


def peak_memory_mb() -> float:
    """Return the most RAM that this process has used so far, in 10^6 bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def process_start() -> float:
    """Return when this process started, imports included, in seconds since the epoch."""
    return float(psutil.Process().create_time())
