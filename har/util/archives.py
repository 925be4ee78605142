"""Unpacks zip and tar archives that others made: regular files only, inside one folder, within
limits that are checked before anything is written.
"""

import lzma
import shutil
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from har.util.errors import UserError, first_line
from har.util.progress import progress
from har.util.units import format_bytes

MAX_FILES, MAX_BYTES = 200_000, 50_000_000_000
# What an archive may take of the disk's free space.
MAX_DISK_SHARE = 0.9
CHUNK, MAX_HEADER = 1 << 20, 1_000_000
DAMAGED = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    OSError,
    RuntimeError,
    NotImplementedError,
    ValueError,
    OverflowError,
    MemoryError,
)


@dataclass(frozen=True, kw_only=True)
class Member:
    """A file or folder of an archive; `problem` says why it cannot be unpacked, else it is ""."""

    name: str
    size: int
    is_folder: bool
    problem: str


def is_archive(path: Path) -> bool:
    """Return True for a file that begins or ends as a zip or tar archive does."""
    if not path.is_file() or zipfile.is_zipfile(path):
        return path.is_file()
    try:
        with tarfile.open(path, tarinfo=_Header):
            return True
    except DamagedHeaderError:
        # unpacking it says so
        return True
    except DAMAGED:
        return False


def unpack(archive: Path, folder: Path, wanted: Callable[[PurePosixPath], bool]) -> None:
    """Unpack the wanted files of `archive` into the new files below `folder`.

    Raises:
        UserError: it is damaged, or too large, or a wanted file is no regular file, is encrypted,
            comes twice or would lie outside of `folder`. Nothing then lies outside of it.
    """
    try:
        if zipfile.is_zipfile(archive):
            _unpack_zip(archive, folder, wanted)
        else:
            _unpack_tar(archive, folder, wanted)
    except (*DAMAGED, DamagedHeaderError) as error:
        raise UserError(f"{archive} cannot be unpacked: {first_line(error)}") from error


def _unpack_zip(archive: Path, folder: Path, wanted: Callable[[PurePosixPath], bool]) -> None:
    with zipfile.ZipFile(archive) as opened:
        infos = opened.infolist()
        members = [
            Member(
                name=each.filename,
                size=each.file_size,
                is_folder=each.is_dir(),
                problem=_find_zip_problem(each),
            )
            for each in infos
        ]
        chosen = _choose(archive, members, folder, wanted)
        by_name = {each.filename: each for each in infos}
        with progress("unpacking", len(chosen)) as advance:
            for name, size in chosen.items():
                with opened.open(by_name[name]) as source:
                    _write(source, folder / PurePosixPath(name), size)
                advance(1)


def _find_zip_problem(info: zipfile.ZipInfo) -> str:
    kind = info.external_attr >> 28
    # the upper bits are a Unix file type: 0 unknown, 4 a folder, 8 a regular file
    if kind not in (0, 4, 8):
        return "is a link or a device"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        # Python unpacks the others without a limit
        return "is compressed in another way than deflate"
    return "is encrypted" if info.flag_bits & 0x1 else ""


class _Header(tarfile.TarInfo):
    """A tar header; Python would read a long name of gigabytes into memory."""

    def _proc_member(self, tarfile: Any) -> Any:
        if not self.isreg() and self.size > MAX_HEADER:
            raise DamagedHeaderError("a header is too large")
        return super()._proc_member(tarfile)  # type: ignore[misc]


class DamagedHeaderError(Exception):
    """A tar header that no honest program writes."""


def _unpack_tar(archive: Path, folder: Path, wanted: Callable[[PurePosixPath], bool]) -> None:
    with tarfile.open(archive, tarinfo=_Header) as opened:
        members = [
            Member(
                name=each.name,
                size=each.size,
                is_folder=each.isdir(),
                problem="" if each.isreg() else "is a link or a device",
            )
            for each in _read_headers(archive, opened)
        ]
        chosen = _choose(archive, members, folder, wanted)
        with progress("unpacking", len(chosen)) as advance:
            for each in opened.getmembers():
                if each.name in chosen and (source := opened.extractfile(each)):
                    _write(source, folder / PurePosixPath(each.name), chosen[each.name])
                    advance(1)


def _read_headers(archive: Path, opened: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield the headers; a compressed archive is decompressed no further than the limits."""
    size = 0
    for number, each in enumerate(opened):
        size += each.size
        _check_limits(archive, number + 1, size, MAX_BYTES)
        yield each


def _check_limits(archive: Path, files: int, size: int, most: float) -> None:
    if files > MAX_FILES:
        raise UserError(f"{archive} has more than {MAX_FILES:,} files")
    if size > most:
        raise UserError(
            f"{archive} would unpack to {format_bytes(size)}; at most {format_bytes(most)} may be"
            " unpacked here"
        )


def _choose(
    archive: Path, members: list[Member], folder: Path, wanted: Callable[[PurePosixPath], bool]
) -> dict[str, int]:
    """Map the names of the wanted files to their sizes, all of them checked."""
    _check_limits(archive, len(members), 0, MAX_BYTES)
    chosen: dict[str, int] = {}
    for each in members:
        path = PurePosixPath(each.name)
        if each.is_folder or not wanted(path):
            continue
        problem = each.problem
        if path.is_absolute() or ".." in path.parts or "\\" in each.name or ":" in path.parts[0]:
            problem = "would lie outside of the folder"
        elif each.name in chosen:
            problem = "comes twice"
        if problem:
            raise UserError(f"{archive} cannot be unpacked: {each.name[:200]!r} {problem}")
        chosen[each.name] = each.size
    free = shutil.disk_usage(folder).free
    _check_limits(archive, 0, sum(chosen.values()), min(MAX_BYTES, MAX_DISK_SHARE * free))
    return chosen


def _write(source: IO[bytes], file: Path, size: int) -> None:
    """Write a new file of exactly `size` bytes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    left = size
    with file.open("xb") as target:
        while chunk := source.read(CHUNK):
            left -= len(chunk)
            if left < 0:
                break
            target.write(chunk)
    if left:
        raise ValueError(f"{file.name} has another size than the archive says")
