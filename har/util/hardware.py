"""The CPUs of this machine, found without TensorFlow."""

import os
import platform
import re
from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")


def cpu_name() -> str:
    """Return the model name of the processor, or its architecture if the name is unknown."""
    found = CPU_INFO.is_file() and re.search(r"model name\s*:\s*(.+)", CPU_INFO.read_text())
    if found:
        return found[1].strip()
    return platform.processor() or platform.machine()


def available_cpus() -> int:
    """Return the number of CPUs that this process may use."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
    return len(allowed) or os.cpu_count() or 1


def has_bfloat16() -> bool:
    """Return True if this CPU has bfloat16 instructions; always False outside Linux."""
    pattern = r"^flags\s*:.*\b(avx512_bf16|amx_bf16)\b"
    return CPU_INFO.is_file() and bool(re.search(pattern, CPU_INFO.read_text(), re.MULTILINE))
