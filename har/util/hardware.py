"""CPUs and memory of this machine, asked of the operating system alone."""

import os
import platform
import re
import resource
import sys
from pathlib import Path

# What a container may take, where it has a limit (control groups, version 2).
CONTROL_GROUP = Path("/sys/fs/cgroup")
CPU_INFO = Path("/proc/cpuinfo")


def cpu_name() -> str:
    """The processor's marketing name, or its architecture where that cannot be read."""
    found = CPU_INFO.is_file() and re.search(r"model name\s*:\s*(.+)", CPU_INFO.read_text())
    if found:
        return found[1].strip()
    return platform.processor() or platform.machine()


def free_memory() -> int:
    """Bytes of RAM that this process may still take: of the machine, or of its container."""
    import psutil

    free = int(psutil.virtual_memory().available)
    try:
        limit = int((CONTROL_GROUP / "memory.max").read_text())
        used = int((CONTROL_GROUP / "memory.current").read_text())
        lines = (CONTROL_GROUP / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):  # no container, or "max": no limit
        return free
    # cached files count as used, but give way
    cached = int(dict(line.split() for line in lines)["inactive_file"])
    return max(0, min(free, limit - used + cached))


def peak_memory_mb() -> float:
    """The most RAM this process has held, in 10^6 bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def available_cpus() -> int:
    """How many processors this process may use."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
    return len(allowed) or os.cpu_count() or 1


def has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 by itself. Only Linux is asked."""
    if not CPU_INFO.is_file():
        return False
    flags = re.search(r"^flags\s*:(.*)$", CPU_INFO.read_text(), re.MULTILINE)
    return flags is not None and bool({"avx512_bf16", "amx_bf16"} & set(flags[1].split()))


def process_start() -> float:
    """When this process began, in seconds since the epoch: its imports are waiting time too."""
    import psutil

    return float(psutil.Process().create_time())
