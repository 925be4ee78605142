"""The CPUs of this machine, asked of the operating system alone."""

import os
import platform
import re
from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")


def cpu_name() -> str:
    """The processor's marketing name, or its architecture where that cannot be read."""
    found = CPU_INFO.is_file() and re.search(r"model name\s*:\s*(.+)", CPU_INFO.read_text())
    if found:
        return found[1].strip()
    return platform.processor() or platform.machine()


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
