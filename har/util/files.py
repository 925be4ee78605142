"""Files that are whole or not there, and on disk when that is said; what tells them apart."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO
from uuid import uuid4


@contextmanager
def replace_file(path: Path) -> Iterator[IO[bytes]]:
    """Yield a new file that takes the place of `path` at the end of the block.

    A reader sees the old content or the new one, never a part, whatever ends the process or the
    machine. After an error the old file stays.
    """
    # a unique name keeps two processes that write one file out of each other's way
    beside = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        with beside.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def replace_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, as it is, line ends too; see `replace_file`."""
    with replace_file(path) as file:
        file.write(text.encode("utf-8"))


def digest_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """The new name of a file on disk too, where folders can be opened."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            # not every network's file system can
            with suppress(OSError):
                os.fsync(descriptor)
        finally:
            os.close(descriptor)


def digest_bytes(data: bytes) -> str:
    """SHA-256, 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def cache_folder() -> Path:
    """Where anything that can be made again is kept: $HAR_CACHE, else ~/.cache/har."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("HAR_CACHE") or Path(base) / "har").resolve()


# A byte of a file's name that is no UTF-8, as `printable` writes it.
NOT_UTF8 = r"\\udc[89a-f][0-9a-f]"


def printable(name: str) -> str:
    """A file's name as it is, but for bytes that are no UTF-8, which no table can hold: those as
    `\\udcff`.
    """
    return name.encode("utf-8", "backslashreplace").decode("utf-8")
