"""Data folders elsewhere, copied into the cache: a training reads its images many times."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import astuple, dataclass
from itertools import islice
from math import ceil, floor
from pathlib import Path

from har.data.folders import MAX_DEPTH, is_hidden
from har.util.errors import UserError, first_line, without_password
from har.util.escaping import for_terminal
from har.util.files import (
    cache_folder,
    digest_bytes,
    read_regular_file,
    replace_file,
    replace_text,
)
from har.util.json_text import parse_json
from har.util.locks import file_lock
from har.util.places import WEB, Stored, Url, list_stored, open_place, read_start
from har.util.progress import progress, say
from har.util.units import format_bytes

# Files that are read at a time; each takes tens of milliseconds.
READERS = 16
# A larger file is read in blocks.
AT_ONCE_BYTES = 8 << 20
# Beside each copy: where it came from.
URL_FILE = "url.txt"
MAX_URL_BYTES = 10_000
# Files that an error names.
MAX_NAMED = 3


def download_folder(url: Url) -> Path:
    """Copy what is new in a folder elsewhere into the cache; return the copy.

    It holds the files that are there now: one with the size and version of an earlier call stays,
    and one that is gone is deleted. Hidden files are left out.

    Raises:
        UserError: the folder cannot be read, or not all of its files, or the disk is too small.
    """
    if url.protocol in WEB:
        raise UserError(
            f"--data {url}: a web server does not list its files: download it, and give the folder"
            " it lies in"
        )
    home = _downloads() / digest_bytes(str(url).rstrip("/").encode())[:16]
    waiting = f"waiting for another download of {url}"
    with file_lock(home / ".lock", waiting=waiting):
        # the data is called by the folder's name; never `..`, and no hidden folder
        folder = home / ("data" if url.name.startswith(".") else url.name or "data")
        journal = home / "journal.jsonl"
        replace_text(home / URL_FILE, without_password(str(url)))
        _Copy(url=url, files=_list_files(url), folder=folder, journal=journal).update()
    return folder


def describe_downloads() -> list[str]:
    """Describe each copy in one line, below a headline; no lines where there are none."""
    lines = [_describe_download(file) for file in sorted(_downloads().glob(f"*/{URL_FILE}"))]
    head = (
        f"{_downloads()}: {len(lines)} data folders from elsewhere; `rm -r` those you do not need"
    )
    return [for_terminal(head), *lines] if lines else []


def _describe_download(file: Path) -> str:
    size = sum(each.stat().st_size for each in file.parent.rglob("*") if each.is_file())
    url = read_regular_file(file, MAX_URL_BYTES).decode("utf-8", "replace")
    return for_terminal(f"{file.parent.name}  {format_bytes(size):>9}  {url}")


def _downloads() -> Path:
    return cache_folder() / "downloads"


def _list_files(url: Url) -> dict[str, Stored]:
    """Map the paths of a folder's files, from the folder, to what the store says about them."""
    try:
        found = list_stored(url)
    except OSError as error:
        raise UserError(f"--data {url} cannot be listed: {first_line(error)}") from error
    if "" in found:
        raise UserError(f"--data {url} is a file: give the folder it lies in")
    folders = {str(above) for path in found for above in Path(path).parents}
    for path in found:
        if why := _refuse_path(path, folders):
            raise UserError(f"--data {url} has the file {path!r}, {why}: rename it")
    files = {path: each for path, each in found.items() if not any(map(is_hidden, _split(path)))}
    if not files:
        raise UserError(f"--data {url}: no files there, or no such folder")
    return files


def _split(path: str) -> list[str]:
    return path.split("/")


def _refuse_path(path: str, folders: set[str]) -> str:
    """Return why a file cannot have this path in a folder; "" if it can."""
    parts = _split(path)
    if {"", ".", ".."} & set(parts) or "\0" in path or not _is_encodable(path):
        return "which no file on this machine can be called"
    if len(parts) > MAX_DEPTH:
        return f"more than {MAX_DEPTH} folders deep"
    return "whose name a folder has too" if path in folders else ""


def _is_encodable(path: str) -> bool:
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        return False
    return True


def _count_bytes(files: Mapping[str, Stored]) -> int:
    return sum(each.size for each in files.values())


@dataclass(frozen=True, kw_only=True)
class _Copy:
    """The copy of a folder that is to hold `files`, and the journal of what was copied: a JSON list
    for each file.
    """

    url: Url
    files: Mapping[str, Stored]
    folder: Path
    journal: Path

    def update(self) -> None:
        """Make the copy hold the files, and no others."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._delete_others()
            if new := self._find_new():
                self._check_space(new)
                self._download(new)
        except OSError as error:
            raise UserError(f"cannot write into {self.folder}: {first_line(error)}") from error

    def _find_new(self) -> dict[str, Stored]:
        before = self._read_journal()
        return {
            path: stored
            for path, stored in self.files.items()
            if before.get(path) != stored or not self._is_there(path, stored.size)
        }

    def _is_there(self, path: str, size: int) -> bool:
        with suppress(OSError):
            return os.path.getsize(self.folder / path) == size
        return False

    def _read_journal(self) -> dict[str, Stored]:
        found = {}
        with suppress(FileNotFoundError):
            for line in self.journal.read_text("utf-8").splitlines():
                # the last line of a process that was killed may be cut
                with suppress(ValueError, TypeError):
                    path, size, version = parse_json(line.encode())
                    found[path] = Stored(size, version)
        return found

    def _delete_others(self) -> None:
        for root, _, names in os.walk(self.folder, topdown=False):
            for name in names:
                file = Path(root) / name
                if file.relative_to(self.folder).as_posix() not in self.files:
                    file.unlink()
            if Path(root) != self.folder and not os.listdir(root):
                os.rmdir(root)

    def _check_space(self, new: Mapping[str, Stored]) -> None:
        needed, free = _count_bytes(new), shutil.disk_usage(self.folder).free
        if needed > free:
            raise UserError(
                f"--data {self.url} needs {format_bytes(needed, ceil)} more in {self.folder}, where"
                f" {format_bytes(free, floor)} are free: set HAR_CACHE to a folder on another disk"
            )

    def _download(self, new: Mapping[str, Stored]) -> None:
        there = f"{len(new):,} of {len(self.files):,} files, {format_bytes(_count_bytes(new))}"
        say(f"downloading {there}, into {self.folder}")
        failed = {}
        with (
            # a line is written when it ends: the process may be killed
            self.journal.open("a", buffering=1, encoding="utf-8") as journal,
            progress("downloading", len(new)) as advance,
        ):
            for path, why in self._download_all(new):
                if why:
                    failed[path] = why
                else:
                    journal.write(json.dumps([path, *astuple(new[path])]) + "\n")
                advance(1)
        if failed:
            named = "; ".join(f"{path}: {why}" for path, why in [*failed.items()][:MAX_NAMED])
            raise UserError(
                f"{len(failed):,} of {len(self.files):,} files of {self.url} were not downloaded,"
                f" such as {named}; the others stay: give the same command again"
            )

    def _download_all(self, new: Mapping[str, Stored]) -> Iterator[tuple[str, str]]:
        """Yield each path and why it could not be read; "" if it was."""
        pool, waiting = ThreadPoolExecutor(READERS, "download"), iter(new)
        try:
            while some := list(islice(waiting, 16 * READERS)):
                yield from zip(some, pool.map(self._explain_file, some), strict=True)
        finally:
            pool.shutdown(cancel_futures=True)

    def _explain_file(self, path: str) -> str:
        try:
            self._download_file(path)
        except OSError as error:
            return first_line(error)
        return ""

    def _download_file(self, path: str) -> None:
        size, written = self.files[path].size, 0
        (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
        with replace_file(self.folder / path) as file:
            # a store may send more than it announced
            for data in _read(self.url / path, size + 1):
                written += file.write(data)
            if written != size:
                raise OSError(f"{written:,} bytes came, not {size:,}; did it change meanwhile?")


def _read(url: Url, most: int) -> Iterator[bytes]:
    if most <= AT_ONCE_BYTES:
        yield read_start(url, most)
        return
    with open_place(url) as file:
        while most > 0 and (data := file.read(min(most, AT_ONCE_BYTES))):
            yield data
            most -= len(data)
