"""Atomic, durable file writes; digests of files; the cache folder."""

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import IO
from uuid import uuid4


@contextmanager
def replace_file(path: Path) -> Iterator[IO[bytes]]:
    """Yield a new file that replaces `path` at the end of the block, atomically and durably.

    A reader sees the old content or the new content, never a part of it, even if the process or
    the machine dies. After an error the old file stays.
    """
    # a random name: two processes may write the same file at the same time
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def replace_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 like `replace_file`; line ends stay as they are."""
    with replace_file(path) as file:
        file.write(text.encode("utf-8"))


def replace_tree(source: Path, out: Path) -> None:
    """Write the files below `source` into the folder `out`; other files there stay.

    Each file is written like `replace_file`. A link in `out` is replaced, never followed.
    """
    out.mkdir(parents=True, exist_ok=True)
    for each in sorted(source.iterdir()):
        target = out / each.name
        if each.is_dir():
            if target.is_symlink():
                target.unlink()
            replace_tree(each, target)
        else:
            with replace_file(target) as file:
                file.write(each.read_bytes())


def sync_folder(folder: Path) -> None:
    """Flush a folder's list of names to disk, on systems that can open a folder."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            # some network file systems do not support it
            with suppress(OSError):
                os.fsync(descriptor)
        finally:
            os.close(descriptor)


def digest_file(path: Path) -> str:
    """Return the SHA-256 of a regular file, 64 hexadecimal digits; any other is an OSError."""
    try:
        with open_regular_file(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except ValueError as error:
        raise OSError(errno.EINVAL, str(error), str(path)) from error


def digest_bytes(data: bytes) -> str:
    """Return the SHA-256 of `data`, 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def cache_folder() -> Path:
    """Return the folder of everything that can be recomputed: $HAR_CACHE, or ~/.cache/har."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("HAR_CACHE") or Path(base) / "har").resolve()


# Matches a byte of a file name that is not UTF-8, in the form that `storable` gives it.
NOT_UTF8 = r"\\udc[89a-f][0-9a-f]"


def storable(name: str) -> str:
    """Return a file name that a table can hold: bytes that are not UTF-8 become `\\udcff`."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


@contextmanager
def open_regular_file(path: Path) -> Iterator[BufferedReader]:
    """Open a file for reading, and nothing but a regular one: a device or a pipe could block or
    never end.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is no regular file.
    """
    # O_NONBLOCK: opening a pipe waits for a writer otherwise
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("not a file")
        yield file


def read_regular_file(path: Path, limit: int) -> bytes:
    """Read a regular file of at most `limit` bytes; a larger one is a ValueError."""
    with open_regular_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        # read more than announced: the file may grow meanwhile
        data = file.read(limit + 1) if size <= limit else b""
    if size > limit or len(data) > limit:
        raise ValueError(f"more than {limit:,} bytes")
    return data


def shorten_home(path: str) -> str:
    """Replace the user's home folder at the beginning of an absolute path by `~`.

    What is recorded for others then does not name the user. `expand_home` restores the path.
    """
    home = os.path.expanduser("~")
    if home in ("~", os.sep) or not Path(path).is_relative_to(home):
        return path
    return str(Path("~", os.path.relpath(path, home)))


def expand_home(path: str) -> str:
    """Replace a `~` at the beginning of a path by the user's home folder."""
    return os.path.expanduser(path) if path == "~" or path.startswith("~/") else path
