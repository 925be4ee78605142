"""Memory, start time and environment of this process."""

import os
import resource
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from har.util.errors import without_password
from har.util.files import shorten_home

# Where Linux states the memory limit of a container (control groups, version 2).
CONTROL_GROUP = Path("/sys/fs/cgroup")


def format_program(name: str) -> str:
    """Format how the user's shell starts a program of this environment, as `har` or `mlflow`.

    That is its name where the environment is active, or is the system's own; else its interpreter,
    since `make run` and `mlflow run` activate an environment only for themselves.
    """
    active = {os.environ.get(variable) for variable in ("VIRTUAL_ENV", "CONDA_PREFIX")}
    if sys.prefix in active or sys.prefix == sys.base_prefix:
        return name
    return f"{shlex.quote(sys.executable)} -m {name}"


@contextmanager
def set_variables(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables of this process, and those it starts, during the block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def spell_command(command: str, options: Mapping[str, Any]) -> str:
    """Spell a command of `har` as a user types it, without the name of the home folder; an option
    that is None is left out.
    """
    words = ["har", command]
    for name, value in options.items():
        if value is not None:
            words += [f"--{name.replace('_', '-')}", shorten_home(without_password(str(value)))]
    return shlex.join(words)


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
