"""Locks between processes of one machine."""

from pathlib import Path

from filelock import FileLock, Timeout

from har.util.progress import say


def acquire_lock(path: Path, waiting: str) -> FileLock:
    """The lock of this file, held: by one process at a time, and freed when it ends, however.

    `waiting` is said where another process holds it.

    Raises:
        OSError, NotImplementedError: the file cannot be written or locked.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(waiting)
        lock.acquire()
    return lock
