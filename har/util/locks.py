"""File locks between the processes of one machine."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from har.util.errors import UserError
from har.util.progress import say


@contextmanager
def file_lock(
    path: Path,
    *,
    waiting: str = "",
    busy: str = "",
    hint: str = "set HAR_CACHE to another folder",
    reentrant: bool = False,
) -> Iterator[None]:
    """Hold the lock file `path` during the block.

    If another process holds the lock, this prints `waiting` and waits, or with `busy` raises a
    UserError of that text. With `reentrant`, a process may enter the block again. The operating
    system releases the lock when the process ends, also after a crash.

    Raises:
        UserError: `busy`, or the file cannot be written or locked; `hint` then says what to do.
    """
    lock = FileLock(path, is_singleton=reentrant)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink():
            # the lock would empty the file that the link names
            raise UserError(f"cannot lock {path}: it is a symbolic link; delete it")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if busy:
                raise UserError(busy) from None
            if waiting:
                say(waiting)
            lock.acquire()
    except (OSError, NotImplementedError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"cannot lock {path}: {why}; {hint}") from error
    try:
        yield
    finally:
        lock.release()
