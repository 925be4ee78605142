"""Arrays of features on disk, each made once: memory-mapped, resumable, checked, bounded.

An entry is a folder named by the digest of what it was made from. It holds `features.npy`, an
array of (rows, features) float32, and `about.json`, which says what it is, how many rows are
there and how long they took, and, once all are, the array's SHA-256. An array that is cut, changed
or of something else is never used.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from filelock import FileLock, Timeout

from har.util.errors import ChangedError, UserError
from har.util.files import cache_folder, digest_file, replace_text
from har.util.locks import acquire_lock
from har.util.progress import say

Features = npt.NDArray[np.float32]
Mapped = np.memmap[Any, np.dtype[np.float32]]
# Compute rows from `start` on into the array given; call the other argument with how many are done
# whenever they can be kept.
Compute = Callable[[Features, int, Callable[[int], None]], None]
ARRAY_FILE = "features.npy"
ABOUT_FILE = "about.json"
# Raise it when the same key would mean other numbers.
VERSION = 2
DEFAULT_LIMIT_GB = 20.0
# Looked at together: what is made of them is not to grow with the array.
ROWS_AT_ONCE = 1024


@dataclass(frozen=True, kw_only=True)
class Key:
    """What features depend on: of nothing else may they be reused.

    `images` and `weights` are digests; `view` counts augmented views from 0 and is 0 without
    augmentation; `runtime` is a name and a version, `device` CPU or GPU, and `arithmetic` what was
    computed with, such as bfloat16.
    """

    images: str
    backbone: str
    weights: str
    image_size: int
    resize: str
    augmentation: str
    view: int
    seed: int
    runtime: str
    device: str
    arithmetic: str

    @property
    def digest(self) -> str:
        """32 hexadecimal digits: the entry's name."""
        text = json.dumps({"version": VERSION, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What lies in the cache."""

    folder: Path
    about: dict[str, Any]

    @property
    def bytes(self) -> int:
        """On disk; files that another process takes away meanwhile count nothing."""
        return sum(_size_of(each) for each in self.folder.glob("*"))

    @property
    def used(self) -> float:
        """When it was last used, in seconds since the epoch; 0 if it is gone."""
        try:
            return (self.folder / ABOUT_FILE).stat().st_mtime
        except OSError:
            return 0.0

    @property
    def complete(self) -> bool:
        """Whether every row is there."""
        return "sha256" in self.about


def _size_of(path: Path) -> int:
    """In bytes; 0 if it is gone."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def features_folder() -> Path:
    """The folder of all entries."""
    return cache_folder() / "features"


def _limit_bytes() -> int:
    """How large the cache may grow: $HAR_CACHE_GB, else 20 GB.

    Raises:
        UserError: that is no number.
    """
    text = os.environ.get("HAR_CACHE_GB", str(DEFAULT_LIMIT_GB))
    try:
        return int(float(text) * 1e9)
    except (ValueError, OverflowError) as error:
        raise UserError(f"HAR_CACHE_GB must be a number of gigabytes; received {text!r}") from error


@dataclass(frozen=True, kw_only=True)
class Found:
    """An entry's array, read only; how many of its rows had to be computed now; and in how many
    seconds those that were there had been computed, by whoever did.
    """

    array: Features
    computed: int
    saved_s: float


def load_or_compute(
    key: Key, shape: tuple[int, int], compute: Compute, check: Callable[[], None] = lambda: None
) -> Found:
    """The entry, computed if need be; `check` raises a ChangedError, before it counts, if it
    was not computed from what the key says.

    A computation that was interrupted goes on where it stood; one at work in another process is
    waited for.

    Raises:
        UserError: the cache cannot be written, or has no room; as `check`.
    """
    folder = features_folder() / key.digest
    with _explain_cache_errors():
        folder.parent.mkdir(parents=True, exist_ok=True)
    with _entry_lock(folder):
        with _explain_cache_errors():
            done, sealed = _count_valid_rows(folder, key, shape)
            saved_s = _read_seconds(folder) if done else 0.0
        if not sealed:
            about = {"key": asdict(key), "version": VERSION, "shape": list(shape)}
            about["seconds"] = saved_s
            with _explain_cache_errors():
                array = _open_array(folder, about, done)
            if done < shape[0]:
                _compute_rows(folder, about, array, done, compute)
            try:
                check()
            except ChangedError:
                # nobody knows which rows are of the other image
                shutil.rmtree(folder, ignore_errors=True)
                raise
            with _explain_cache_errors():
                _complete_entry(folder, about, array)
        with _explain_cache_errors():
            os.utime(folder / ABOUT_FILE)
            array = np.load(folder / ARRAY_FILE, mmap_mode="r")
            return Found(array=array, computed=shape[0] - done, saved_s=saved_s)


@contextmanager
def _explain_cache_errors() -> Iterator[None]:
    """Meanwhile what the system refuses is the cache's fault, and not of what is computed.

    Raises:
        UserError: no room, no permission.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"the feature cache {features_folder()} cannot be used: {error};"
            " set HAR_CACHE to another folder"
        ) from error


@contextmanager
def _entry_lock(folder: Path) -> Iterator[None]:
    """Held by one process at a time; freed when it ends, however."""
    waiting = "waiting for another process that computes the same features"
    with _explain_cache_errors():
        lock = acquire_lock(Path(f"{folder}.lock"), waiting)
    try:
        yield
    finally:
        lock.release()


def _count_valid_rows(folder: Path, key: Key, shape: tuple[int, int]) -> tuple[int, bool]:
    """How many of an entry's rows can be used, and whether it is whole and was sealed.

    (0, False), and nothing left of it, if it is not sound.
    """
    about = _read_about(folder)
    expected = {"key": asdict(key), "version": VERSION, "shape": list(shape)}
    known = about is not None and all(about.get(name) == want for name, want in expected.items())
    if known and about is not None and _read_array(folder, shape) is not None:
        if "sha256" not in about:
            return int(about["done"]), False
        if about["sha256"] == digest_file(folder / ARRAY_FILE):
            return shape[0], True
    if folder.exists():
        say(f"invalid, recomputed: {folder}")
        shutil.rmtree(folder)
    return 0, False


def _read_about(folder: Path) -> dict[str, Any] | None:
    """An entry's description; None if there is none, or it is no JSON."""
    try:
        found = json.loads((folder / ABOUT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _read_seconds(folder: Path) -> float:
    """Seconds that an entry's rows took to be computed."""
    return float((_read_about(folder) or {}).get("seconds", 0.0))


def _read_array(folder: Path, shape: tuple[int, int]) -> Features | None:
    """The array if it is one of that shape; never a pickle."""
    try:
        array = np.load(folder / ARRAY_FILE, mmap_mode="r", allow_pickle=False)
    # an empty file is an EOFError
    except (OSError, ValueError, EOFError):
        return None
    return array if array.shape == shape and array.dtype == np.float32 else None


def _open_array(folder: Path, about: dict[str, Any], done: int) -> Mapped:
    """The entry's file, mapped for writing; made with room for every row where none is done."""
    shape = tuple(about["shape"])
    if not done:
        _make_room(folder, shape)
        folder.mkdir(exist_ok=True)
        # first of all: what is there is listed, and can be cleared, whatever comes next
        replace_text(folder / ABOUT_FILE, json.dumps({**about, "done": 0}))
    array: Mapped = np.lib.format.open_memmap(  # type: ignore[no-untyped-call]
        folder / ARRAY_FILE, mode="r+" if done else "w+", dtype=np.float32, shape=shape
    )
    if not done and hasattr(os, "posix_fallocate"):
        # a full disk is an error now, and no crash when a page is written
        try:
            with (folder / ARRAY_FILE).open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
        except OSError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    return array


def _compute_rows(
    folder: Path, about: dict[str, Any], array: Mapped, done: int, compute: Compute
) -> None:
    """Compute the rows from `done` on; what is done is on disk before about.json says so, and how
    many seconds it took.
    """
    started, before_s = time.monotonic(), about["seconds"]

    def keep(rows: int) -> None:
        about["seconds"] = before_s + time.monotonic() - started
        with _explain_cache_errors():
            array.flush()
            replace_text(folder / ABOUT_FILE, json.dumps({**about, "done": rows}))

    compute(array, done, keep)
    keep(len(array))


def _complete_entry(folder: Path, about: dict[str, Any], array: Features) -> None:
    """Check every row, and write down the file's digest.

    Raises:
        UserError: a number is none; nothing of the entry is left.
    """
    parts = range(0, len(array), ROWS_AT_ONCE)
    if not all(np.isfinite(array[start : start + ROWS_AT_ONCE]).all() for start in parts):
        shutil.rmtree(folder)
        raise UserError("the backbone's output is not finite: check its weights and its precision")
    digest = {"done": len(array), "sha256": digest_file(folder / ARRAY_FILE)}
    replace_text(folder / ABOUT_FILE, json.dumps(about | digest))


def check_limit(needed: int) -> None:
    """Raise a UserError if so many bytes would not fit even an empty cache."""
    if needed > (limit := _limit_bytes()):
        raise UserError(
            f"the features need {needed / 1e9:.1f} GB and the cache may hold {limit / 1e9:.1f} GB:"
            " raise HAR_CACHE_GB, or use another loader"
        )


def _make_room(folder: Path, shape: tuple[int, int]) -> None:
    """Drop what was not used for longest until the new array fits under the limit.

    Raises:
        UserError: it is larger than the limit, or than what is free on the disk.
    """
    needed, limit = shape[0] * shape[1] * 4, _limit_bytes()
    check_limit(needed)
    entries = [each for each in list_entries() if each.folder != folder]
    total = sum(each.bytes for each in entries)
    for oldest in sorted(entries, key=lambda each: each.used):
        if total + needed <= limit:
            break
        size = oldest.bytes
        # one at work stays, and the cache is larger than the limit until that is done
        if delete_entry(oldest):
            say(f"the feature cache is full: dropped {oldest.folder.name}")
            total -= size
    say(
        f"features: {shape[0]:,} x {shape[1]:,} float32, {needed / 1e6:,.1f} MB in"
        f" {features_folder()}"
    )
    if needed > (free := shutil.disk_usage(features_folder()).free):
        raise UserError(
            f"the features need {needed / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free in"
            f" {features_folder()}: set HAR_CACHE to another folder"
        )


def list_entries() -> list[Entry]:
    """Every entry, the last used first; folders that do not say what they hold are none."""
    with _explain_cache_errors():
        folders = [each for each in features_folder().glob("*") if each.is_dir()]
    entries = [
        Entry(folder=each, about=about)
        for each in folders
        if (about := _read_about(each)) and {"key", "shape", "done"} <= set(about)
    ]
    return sorted(entries, key=lambda each: -each.used)


def delete_entry(entry: Entry) -> bool:
    """Delete an entry, unless a process is at work on it; whether it was deleted.

    Who has mapped the array keeps what it has.
    """
    lock = FileLock(f"{entry.folder}.lock")
    try:
        with lock.acquire(timeout=0):
            shutil.rmtree(entry.folder, ignore_errors=True)
    except (Timeout, OSError):
        return False
    return not entry.folder.exists()


def clear_cache() -> int:
    """Delete every entry that no process is at work on; how many bytes that frees."""
    sizes = [(each.bytes, delete_entry(each)) for each in list_entries()]
    return sum(size for size, removed in sizes if removed)


def describe_cache() -> str:
    """A line an entry, and the whole."""
    entries = list_entries()
    lines = [_describe_entry(each) for each in entries]
    total = sum(each.bytes for each in entries)
    used = f"{total / 1e6:,.1f} MB of {_limit_bytes() / 1e6:,.0f}"
    head = f"{features_folder()}: {len(entries)} entries, {used}"
    return "\n".join([head, *lines])


def _describe_entry(entry: Entry) -> str:
    """What it is, in one line."""
    key, (rows, features) = entry.about["key"], entry.about["shape"]
    state = "complete" if entry.complete else f"{entry.about['done']:,} done"
    view = f" view {key['view']}" if key["augmentation"] != "none" else ""
    used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
    return (
        f"{entry.folder.name[:12]}  {used}  {entry.bytes / 1e6:>9,.1f} MB  {rows:,} x {features}"
        f"  {key['backbone']} {key['image_size']} px, {key['runtime']} {key['arithmetic']}"
        f"{view}, {state}"
    )
