"""Lists the files of a data folder: regular ones inside it, without hidden and system files."""

import os
import stat
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from har.data.kinds import HEAD_BYTES, READABLE, name_kind
from har.util.files import open_regular_file
from har.util.outputs import is_output
from har.util.places import MAX_DEPTH

# What systems and tools leave in folders, MLflow among them; names that begin with a dot are
# skipped too.
SYSTEM_NAMES = frozenset(
    {
        "__macosx", "__pycache__", "@eadir", "#recycle", "$recycle.bin", "lost+found",
        "system volume information", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r",
        "mlruns", "mlartifacts", "mlflow.db",
    }
)  # fmt: skip
# Files with these suffixes are images, or were meant to be. Others are if they begin like one.
IMAGE_SUFFIXES = frozenset(
    {
        ".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib",
        ".tif", ".tiff", ".avif", ".heic", ".heif", ".hif", ".jxl", ".jp2", ".dng", ".cr2", ".nef",
    }
)  # fmt: skip
# The reason for a pipe, a device and their like.
NOT_A_FILE = "not a file"
LINK_OUT = "a link out of the data folder"


@dataclass(frozen=True)
class Listing:
    """The files of a folder, as paths from it with forward slashes, in alphabetical order.

    `refused` has the reason for each file and folder that must not be read.
    """

    files: dict[str, os.stat_result]
    refused: dict[str, str] = field(default_factory=dict)

    def below(self, folder: str) -> list[str]:
        """List the files in `folder`, at any depth."""
        return [path for path in self.files if path.startswith(f"{folder}/")]


def is_hidden(name: str) -> bool:
    """Return True for a name that people do not mean as data: hidden, or of a system."""
    return name.startswith(".") or name.casefold() in SYSTEM_NAMES


def list_files(root: Path) -> Listing:
    """List the regular files below `root`; a link counts if what it names is inside `root` too."""
    files: dict[str, os.stat_result] = {}
    refused: dict[str, str] = {}
    inside = os.path.realpath(root)
    # folders to visit; in a linked one no more links are followed, for their paths would multiply
    waiting = [("", False)]
    while waiting:
        folder, linked = waiting.pop()
        try:
            entries = sorted(os.scandir(root / folder), key=lambda entry: entry.name)
        except OSError as error:
            refused[folder or "."] = f"cannot be read: {error.strerror}"
            continue
        for entry in entries:
            if is_hidden(entry.name):
                continue
            path = f"{folder}/{entry.name}" if folder else entry.name
            found = _inspect(entry, inside)
            if isinstance(found, str):
                refused[path] = found
            elif stat.S_ISREG(found.st_mode):
                files[path] = found
            elif linked and entry.is_symlink():
                refused[path] = "a link in a linked folder"
            elif path.count("/") > MAX_DEPTH or _is_above(entry):
                refused[path] = (
                    f"a link to a folder above it, or more than {MAX_DEPTH} folders deep"
                )
            elif not is_output(root / path):
                waiting.append((path, linked or entry.is_symlink()))
    return Listing(dict(sorted(files.items())), dict(sorted(refused.items())))


def _is_above(entry: "os.DirEntry[str]") -> bool:
    """Return True for a link to a folder that it lies in."""
    if not entry.is_symlink():
        return False
    return is_inside(os.path.realpath(os.path.dirname(entry.path)), os.path.realpath(entry.path))


def _inspect(entry: "os.DirEntry[str]", inside: str) -> os.stat_result | str:
    """Return the facts of a file or folder, or the reason why it must not be read."""
    try:
        if entry.is_symlink() and not is_inside(os.path.realpath(entry.path), inside):
            return LINK_OUT
        found = entry.stat()
    except OSError as error:
        # a link to nothing, or to itself
        return "no such file" if entry.is_symlink() else f"cannot be read: {error.strerror}"
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
        return NOT_A_FILE
    return found


def is_inside(real: str, folder: str) -> bool:
    """Return True if `real` is in `folder`; both must be real paths, without links."""
    return real == folder or real.startswith(folder.rstrip(os.sep) + os.sep)


def visible_folders(folder: Path) -> Iterator[Path]:
    """Yield the folders in `folder` that are not hidden, in alphabetical order."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return
    for name in names:
        # False for a link to itself, where DirEntry.is_dir raises an error
        path = folder / name
        if not is_hidden(name) and path.is_dir() and not is_output(path):
            yield path


def normalise_path(path: str) -> str:
    """Return a path in the form in which paths are compared: NFC, `/`, no `./` and no `//`."""
    parts = unicodedata.normalize("NFC", path).replace("\\", "/").split("/")
    return "/".join(part for part in parts if part not in ("", "."))


def has_image_suffix(path: str) -> bool:
    """Return True for a name that ends like an image's."""
    return os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES


def find_file_kind(path: Path) -> str:
    """Return the kind of a regular file by how it begins, as `har.data.kinds` names it."""
    try:
        with open_regular_file(path) as file:
            return name_kind(file.read(HEAD_BYTES))
    except (OSError, ValueError):
        return ""


def is_image(root: Path, path: str) -> bool:
    """Return True for a file in `root` that is an image, or has the name of one."""
    return has_image_suffix(path) or find_file_kind(root / path) in READABLE


def check_files(root: Path, paths: Iterable[str]) -> Iterator[int | str]:
    """Yield the size of each file in `root`, or the reason why it must not be read."""
    inside = os.path.realpath(root)
    # to find where a folder really is takes longer than to look at a file in it
    real_folders: dict[str, str] = {}
    for path in paths:
        if os.path.isabs(path) or (".." in path and ".." in path.split("/")):
            yield "is out of the data folder: paths must stay inside"
            continue
        folder, _, name = path.rpartition("/")
        if folder not in real_folders:
            real_folders[folder] = os.path.realpath(os.path.join(inside, folder))
        real = f"{real_folders[folder]}/{name}"
        try:
            found = os.lstat(real)
            if stat.S_ISLNK(found.st_mode):
                real = os.path.realpath(real)
                found = os.stat(real)
        except OSError as error:
            yield f"is gone: {error.strerror}"
            continue
        if not is_inside(real, inside):
            yield f"is {LINK_OUT}"
        else:
            yield found.st_size if stat.S_ISREG(found.st_mode) else f"is {NOT_A_FILE}"
