"""Files and folders of this machine, or elsewhere by a URL, which the package fsspec reaches.

A place is a `Path` or a `Url`. Nothing is said here of how to sign in: fsspec's packages find a
user's keys and addresses as those of the stores do, on S3 in AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL
and so on.
"""

import importlib.util
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import IO, Any
from urllib.parse import unquote
from uuid import uuid4

from har.util.errors import UserError, first_line
from har.util.files import open_regular_file, read_regular_file, replace_file

# The package that reads a protocol, and what to install. fsspec knows others too; some of them open
# archives, caches and repositories, or this machine's files under another name.
S3, GS, AZURE = "s3fs>=2025.9,<2027", "gcsfs>=2025.9,<2027", "adlfs>=2025.8,<2027"
PROTOCOLS = {
    "s3": ("s3fs", S3),
    "gs": ("gcsfs", GS),
    "gcs": ("gcsfs", GS),
    "az": ("adlfs", AZURE),
    "abfs": ("adlfs", AZURE),
    "http": ("aiohttp", "fsspec[http]"),
    "https": ("aiohttp", "fsspec[http]"),
    "sftp": ("paramiko", "fsspec[sftp]"),
    "memory": ("fsspec", "fsspec"),
}
EXTRAS = {S3: "s3fs", GS: "gs"}
WEB = ("http", "https")
# An object is there when all of it was sent; a file of others is written, then renamed.
WHOLE = ("s3", "gs", "gcs", "az", "abfs", "memory")
# What packages call a file's version, or the time when it was written.
VERSIONS = (
    "ETag", "etag", "md5Hash", "generation", "LastModified", "last_modified", "mtime", "created",
)  # fmt: skip
# Deeper folders are refused: a walk without a limit could go on for ever on some file systems.
MAX_DEPTH = 32
# Bytes that are asked for at once of a large file.
BLOCK_BYTES = 8 << 20
# With `::` in the protocol, to refuse fsspec's chains: archives, caches, one store in another.
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.:-]*)://.*", re.DOTALL)
_FILE = "file://"


@dataclass(frozen=True)
class Url:
    """A file or a folder elsewhere. It has the names and methods of a `Path` that are needed."""

    text: str

    def __str__(self) -> str:
        return self.text

    def __truediv__(self, name: str) -> "Url":
        return Url(f"{self.text.rstrip('/')}/{name}")

    @property
    def protocol(self) -> str:
        """What stands before `://`."""
        found = _URL.fullmatch(self.text)
        return found[1].lower() if found else ""

    @property
    def name(self) -> str:
        """The last part of the path; "" for a bucket or a host."""
        _, slash, name = self.text.partition("://")[2].rstrip("/").rpartition("/")
        return name if slash else ""

    @property
    def suffix(self) -> str:
        """The ending of the name, such as `.csv`; "" for a URL that ends with a slash."""
        return "" if self.text.endswith("/") else Path(self.name).suffix

    @property
    def parent(self) -> "Url":
        """The folder around it."""
        return Url(self.text.rstrip("/").removesuffix(self.name).rstrip("/"))

    def with_name(self, name: str) -> "Url":
        """Return the URL of a neighbour."""
        return self.parent / name


Place = Path | Url


@dataclass(frozen=True)
class Stored:
    """What a store says about a file: its bytes, and a text that changes when the file does."""

    size: int
    version: str


def parse_place(text: str) -> Place:
    """Return a path, also for `file:///PATH`, or a URL.

    Raises:
        UserError: it is no URL that can be used here.
    """
    if not _URL.fullmatch(text):
        return Path(text)
    if text.lower().startswith(_FILE):
        path = text[len(_FILE) :].removeprefix("localhost")
        if not path.startswith("/"):
            raise UserError(f"a file on this machine is file:///PATH; received {text}")
        return Path(unquote(path, errors="surrogateescape"))
    check_url(url := Url(text))
    return url


def is_url(text: str) -> bool:
    """Return True for a text such as `s3://bucket/name`."""
    return _URL.fullmatch(text) is not None


def check_url(url: Url) -> None:
    """Raise a UserError unless a URL's protocol is known, and its package installed."""
    if "::" in url.text:
        raise UserError(f"a URL must not have '::' (chained file systems); received {url}")
    check_protocol(url)


def check_protocol(url: Url) -> None:
    """Raise a UserError unless a URL's protocol is known, and its package installed."""
    if url.protocol not in PROTOCOLS:
        known = ", ".join(f"{each}://" for each in PROTOCOLS if each != "memory")
        raise UserError(f"{url.protocol}:// is not read here, but {known}; received {url}")
    module, package = PROTOCOLS[url.protocol]
    if not (importlib.util.find_spec("fsspec") and importlib.util.find_spec(module)):
        extra = f" (the extra {EXTRAS[package]})" if package in EXTRAS else ""
        raise UserError(f"{url.protocol}:// needs {module}: pip install '{package}'{extra}")


def _connect(url: Url) -> tuple[Any, str]:
    """Return fsspec's file system for a URL, and the path in it."""
    check_url(url)
    import fsspec

    kind = fsspec.get_filesystem_class(url.protocol)
    return kind(**kind._get_kwargs_from_urls(url.text)), kind._strip_protocol(url.text)


@contextmanager
def _as_os_errors() -> Iterator[None]:
    """Turn what a file system raises into an OSError; a missing file stays FileNotFoundError."""
    try:
        yield
    except (UserError, FileNotFoundError):
        raise
    # each package has errors of its own, many of them with no base but Exception
    except Exception as error:
        raise OSError(first_line(error)) from error


def read_start(url: Url, most: int) -> bytes:
    """Read the first bytes of a file elsewhere, at most `most`, in one request where possible.

    Raises:
        OSError: it cannot be read.
    """
    with _as_os_errors():
        files, path = _connect(url)
        if url.protocol in WEB:
            return _read_stream(files, path, most)
        try:
            return bytes(files.cat_file(path, start=0, end=most))
        except OSError:
            # S3 has no first bytes of an empty object
            if files.info(path)["size"] == 0:
                return b""
            raise


def _read_stream(files: Any, path: str, most: int) -> bytes:
    """Read from a web server, which may send more than it was asked for, or never end."""
    found = bytearray()
    # without any size, it is asked for first, and each refusal is a missing file
    with files.open(path, "rb", block_size=0, size=1) as file:
        while len(found) < most and (data := file.read(most - len(found))):
            found += data
    return bytes(found)


def read_place(place: Place, limit: int) -> bytes:
    """Read a file of at most `limit` bytes; a larger one is a ValueError.

    Raises:
        OSError: it cannot be read.
    """
    if isinstance(place, Path):
        return read_regular_file(place, limit)
    data = read_start(place, limit + 1)
    if len(data) > limit:
        raise ValueError(f"more than {limit:,} bytes")
    return data


@contextmanager
def open_place(place: Place) -> Iterator[IO[bytes]]:
    """Open a large file to be read at any position; an OSError or ValueError if that fails."""
    if isinstance(place, Path):
        with open_regular_file(place) as file:
            yield file
        return
    with _as_os_errors():
        files, path = _connect(place)
        opened = files.open(path, "rb", block_size=BLOCK_BYTES)
    with opened, _as_os_errors():
        yield opened


def list_below(folder: Url) -> list[str]:
    """List the files below a folder, at any depth, as paths from it; [""] for a file.

    Raises:
        OSError: they cannot be listed. Object stores have no empty folders: [] for a missing one.
    """
    return sorted(_find_below(folder, detail=False))


def list_stored(folder: Url) -> dict[str, Stored]:
    """Map the paths that `list_below` lists to what the store says about the files."""
    found = _find_below(folder, detail=True)
    with _as_os_errors():
        return {path: _describe(found[path]) for path in sorted(found)}


def _find_below(folder: Url, detail: bool) -> dict[str, Any]:
    with _as_os_errors():
        files, path = _connect(folder)
        files.invalidate_cache()
        if folder.protocol in WHOLE:
            found = files.find(path, detail=detail)
        else:
            found = walk_files(files, path)
        described = found if detail else dict.fromkeys(found)
    return {
        each.removeprefix(path).removeprefix("/"): described[each]
        for each in described
        if not each.endswith("/")
    }


def walk_files(files: Any, path: str) -> dict[str, Any]:
    """Describe the files below a path in a file system with folders. fsspec's own `find` leaves out
    a folder that cannot be listed.
    """
    if files.isfile(path):
        return {path: files.info(path)}
    found, waiting = {}, [(path, 0)]
    while waiting:
        folder, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise OSError(f"folders are more than {MAX_DEPTH} deep")
        for each in files.ls(folder, detail=True):
            name = each["name"]
            # of a link, what it names
            info = files.info(name) if each["type"] == "link" else each
            if info["type"] != "directory":
                found[name] = info
            elif each["type"] == "link":
                raise OSError(f"{name} is a link to a folder")
            else:
                waiting.append((name, depth + 1))
    return found


def _describe(info: Any) -> Stored:
    version = next((str(info[name]) for name in VERSIONS if info.get(name)), "")
    if (size := int(info.get("size") or 0)) < 0:
        raise OSError(f"a file of {size} bytes")
    return Stored(size, version)


def list_names(folder: Place) -> set[str]:
    """List the names directly in a folder; an OSError if that fails, or if it is a file."""
    if isinstance(folder, Path):
        return {each.name for each in folder.iterdir()}
    with _as_os_errors():
        files, path = _connect(folder)
        files.invalidate_cache()
        try:
            found = {each.rstrip("/") for each in files.ls(path, detail=False)}
        except FileNotFoundError:
            # as in an object store, where a folder is there with its first file
            return set()
    if path in found and len(found) == 1 and list_below(folder) == [""]:
        raise OSError("it is a file")
    return {each.rpartition("/")[2] for each in found - {path}}


def exists(file: Url) -> bool:
    """Return True if a file is there; an OSError if nobody can tell."""
    with _as_os_errors():
        files, path = _connect(file)
        files.invalidate_cache()
        try:
            files.info(path)
        except FileNotFoundError:
            return False
        return True


@contextmanager
def replace_place(place: Place) -> Iterator[IO[bytes]]:
    """Yield a new file that replaces `place` at the end of the block, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    if isinstance(place, Path):
        with replace_file(place) as replaced:
            yield replaced
        return
    with NamedTemporaryFile() as file:
        yield file  # type: ignore[misc]
        file.flush()
        with _as_os_errors():
            _upload(file.name, place)


def _upload(source: str, place: Url) -> None:
    files, path = _connect(place)
    if place.protocol in WHOLE:
        files.put_file(source, path)
        return
    folder, _, name = path.rpartition("/")
    temporary = f"{folder}/.{name}.{uuid4().hex}"
    files.makedirs(folder, exist_ok=True)
    try:
        files.put_file(source, temporary)
        files.mv(temporary, path)
    except BaseException:
        with suppress(Exception):
            files.rm_file(temporary)
        raise


def delete_names(folder: Url, names: list[str]) -> None:
    """Delete files of a folder by their names, and the folder where there are such.

    One by one: fsspec would take a `*` in a path for many files.
    """
    with _as_os_errors():
        files, path = _connect(folder)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(files.rm_file, [f"{path}/{name}" for name in names]))
    if folder.protocol not in WHOLE:
        with suppress(Exception):
            files.rmdir(path)


def encode_place(place: Place) -> bytes:
    """Return a place as bytes; a path may not be UTF-8."""
    return os.fsencode(str(place))


def decode_place(data: bytes) -> Place:
    """Return the place that `encode_place` encoded: no `Path` has `://` in it."""
    text = os.fsdecode(data)
    return Url(text) if is_url(text) else Path(text)
