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

from har.data.folders import is_hidden
from har.util.errors import UserError, first_line, without_password
from har.util.escaping import for_terminal
from har.util.files import (
    cache_folder,
    digest_bytes,
    read_regular_file,
    replace_file,
    replace_text,
    storable,
)
from har.util.json_text import parse_json
from har.util.locks import file_lock
from har.util.places import (
    MAX_DEPTH,
    WEB,
    Stored,
    Url,
    encode_place,
    list_stored,
    open_place,
    read_start,
)
from har.util.progress import progress, say
from har.util.units import format_bytes

# Files that are read at a time; each takes tens of milliseconds.
READERS = 16
# A larger file is read in blocks.
AT_ONCE_BYTES = 8 << 20
# Of each copy: what it has.
JOURNAL = "journal.jsonl"
MAX_PATH = 2000
# Beside the copies: where they came from.
URL_FILE = "url.txt"
MAX_URL_BYTES = 2000
# Files that an error names.
MAX_NAMED = 3


def download_folder(url: Url) -> Path:
    """Copy what is new in a folder elsewhere into the cache; return the copy.

    It holds the files that are there now. Those with the size and version of an earlier copy are
    linked from there, and that copy stays as it is. Hidden files are left out.

    Raises:
        UserError: the folder cannot be read, or not all of its files, or the disk is too small.
    """
    if url.protocol in WEB:
        raise UserError(
            f"--data {url}: a web server does not list its files: download it, and give the folder"
            " it lies in"
        )
    home = _downloads() / digest_bytes(encode_place(url).rstrip(b"/"))[:16]
    waiting = f"waiting for another download of {url}"
    with file_lock(home / ".lock", waiting=waiting):
        files = _list_files(url)
        replace_text(home / URL_FILE, storable(without_password(str(url)))[:MAX_URL_BYTES])
        # a training may be reading an earlier state of the folder
        state = home / digest_bytes(repr(sorted(files.items())).encode("utf-8", "replace"))[:16]
        # the data is called by the folder's name; never `..`, and no hidden folder
        folder = state / ("data" if url.name.startswith(".") else url.name or "data")
        _Copy(url=url, files=files, folder=folder, journal=state / JOURNAL).update(home)
    return folder


def describe_downloads() -> list[str]:
    """Describe each copy in one line, below a headline; no lines where there are none."""
    lines = [_describe_download(file) for file in sorted(_downloads().glob(f"*/{URL_FILE}"))]
    head = (
        f"{_downloads()}: {len(lines)} data folders from elsewhere; `rm -r` those you do not need"
    )
    return [for_terminal(head), *lines] if lines else []


def _describe_download(file: Path) -> str:
    sizes, url = {}, ""
    for each in file.parent.rglob("*"):
        # a download at work renames and deletes
        with suppress(OSError):
            found = each.lstat()
            # copies share the files that did not change
            sizes[found.st_ino] = found.st_size
    with suppress(OSError, ValueError):
        url = read_regular_file(file, 4 * MAX_URL_BYTES).decode("utf-8", "replace")
    return for_terminal(f"{file.parent.name}  {format_bytes(sum(sizes.values())):>9}  {url}")


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
    for path in found:
        if why := _refuse_path(path):
            raise UserError(f"--data {url} has the file {path[:200]!r}, {why}: rename it")
    for folder in {str(above) for path in found for above in Path(path).parents} & found.keys():
        raise UserError(f"--data {url} has the file {folder!r}, and a folder of that name")
    files = {path: each for path, each in found.items() if not any(map(is_hidden, _split(path)))}
    if not files:
        raise UserError(f"--data {url}: no files there, or no such folder")
    return files


def _split(path: str) -> list[str]:
    return path.split("/")


def _refuse_path(path: str) -> str:
    """Return why a file cannot have this path in a folder; "" if it can."""
    parts = _split(path)
    if len(parts) > MAX_DEPTH or len(path) > MAX_PATH:
        return f"more than {MAX_DEPTH} folders or {MAX_PATH:,} characters deep"
    # a chain of file systems, to fsspec
    odd = "\0" in path or "::" in path or not _is_encodable(path)
    if odd or {"", ".", ".."} & set(parts):
        return "which no file here can be called"
    return ""


def _is_encodable(path: str) -> bool:
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        return False
    return True


def _count_bytes(files: Mapping[str, Stored]) -> int:
    return sum(each.size for each in files.values())


def _has_size(file: Path, size: int) -> bool:
    with suppress(OSError):
        return os.path.getsize(file) == size
    return False


def _link(source: Path, target: Path) -> None:
    """Make `target` the same file; a copy where the disk has no such links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _format_entry(path: str, stored: Stored) -> str:
    return json.dumps([path, *astuple(stored)]) + "\n"


def _read_journal(journal: Path) -> dict[str, Stored]:
    found = {}
    with suppress(FileNotFoundError):
        for line in journal.read_text("utf-8").splitlines():
            # the last line of a process that was killed may be cut
            with suppress(ValueError, TypeError):
                path, size, version = parse_json(line.encode())
                found[path] = Stored(size, version)
    return found


@dataclass(frozen=True, kw_only=True)
class _Copy:
    """The copy of a folder in the state that has `files`, and the journal of what was copied: a
    JSON list for each file.
    """

    url: Url
    files: Mapping[str, Stored]
    folder: Path
    journal: Path

    def update(self, home: Path) -> None:
        """Make the copy hold the files; those that did not change, from the copies in `home`."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if (new := self._find_new()) and (new := self._link_others(new, home)):
                self._check_space(new)
                self._download(new)
        except OSError as error:
            raise UserError(f"cannot write into {self.folder}: {first_line(error)}") from error

    def _find_new(self) -> dict[str, Stored]:
        before = _read_journal(self.journal)
        return {
            path: stored
            for path, stored in self.files.items()
            if before.get(path) != stored or not _has_size(self.folder / path, stored.size)
        }

    def _link_others(self, new: Mapping[str, Stored], home: Path) -> dict[str, Stored]:
        """Link the new files that other copies have; return those that none has."""
        wanted = dict(new)
        with self.journal.open("a", buffering=1, encoding="utf-8") as journal:
            for other in home.glob(f"*/{JOURNAL}"):
                if other == self.journal:
                    continue
                for path, stored in _read_journal(other).items():
                    file = other.parent / self.folder.name / path
                    if wanted.get(path) == stored and _has_size(file, stored.size):
                        _link(file, self.folder / path)
                        journal.write(_format_entry(path, stored))
                        del wanted[path]
        return wanted

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
                    journal.write(_format_entry(path, new[path]))
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
        # the packages have errors of their own
        except Exception as error:
            return first_line(error)
        return ""

    def _download_file(self, path: str) -> None:
        size, written = self.files[path].size, 0
        (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
        with replace_file(self.folder / path) as file:
            # a store may send more than it announced
            for data in _read(self.url / path, size + 1) if size else ():
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
