"""Features on disk: written in shards, checked when read, bounded in size.

An entry is a folder named by the digest of its key. Shard 7 is the file `00007.npz` with the
features of SHARD_ROWS images as floats and the seconds that computing them took. A shard is
written atomically, and its zip checksums are compared when it is read: a missing or damaged shard
is computed again, and the others stay. `about.json` describes the entry for `har cache`.
"""

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from har.training.arrays import load_arrays
from har.util.errors import UserError, first_line
from har.util.escaping import for_terminal
from har.util.files import (
    cache_folder,
    digest_file,
    read_regular_file,
    replace_file,
    replace_text,
)
from har.util.json_text import check_number, is_plain, parse_json
from har.util.locks import file_lock
from har.util.progress import say
from har.util.units import format_bytes

Features = npt.NDArray[np.floating[Any]]
# An interruption loses one shard: half a minute of EfficientNetB7 on two CPU cores.
SHARD_ROWS = 1024
ABOUT_FILE = "about.json"
# The whole array in one file, as older versions wrote it.
OLD_ARRAY_FILE = "features.npy"
# Raise it when the same key would mean other numbers.
VERSION = 2
# What a description may say: more than any entry needs, and little enough to be shown.
MAX_ABOUT_BYTES = 100_000
MAX_DIMENSIONS, MAX_SIDE, MAX_DIGITS = 5, 10**9, 9
MAX_SECONDS = 1e9
DEFAULT_LIMIT_GB = 20.0
OTHER_FOLDER = "set HAR_CACHE to another folder"


@dataclass(frozen=True, kw_only=True)
class Key:
    """Everything that features depend on.

    `images` and `weights` are SHA-256 digests. `view` counts augmented views from 0, and is 0
    without augmentation. `runtime` is a name and a version, `device` CPU or GPU, `arithmetic` such
    as bfloat16. `layer` names the layer whose output is cached, "" for the whole backbone.
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
    layer: str = ""

    @property
    def fields(self) -> dict[str, Any]:
        """Every field; without `layer` where it is "", as keys were before it was added."""
        found = asdict(self)
        if not self.layer:
            del found["layer"]
        return found

    @property
    def digest(self) -> str:
        """32 hexadecimal digits: the entry's name."""
        text = json.dumps({"version": VERSION, **self.fields}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One folder of the cache; `shape` is (images, ...) of the whole array."""

    folder: Path
    key: dict[str, Any]
    shape: tuple[int, ...]

    @property
    def num_shards(self) -> int:
        """The number of shards, present or missing."""
        return -(-self.shape[0] // SHARD_ROWS)

    def rows(self, shard: int) -> range:
        """The rows of the whole array that a shard holds."""
        return range(self.shape[0])[shard * SHARD_ROWS : (shard + 1) * SHARD_ROWS]

    def read(self, shard: int) -> tuple[Features, float] | None:
        """A shard's features and the seconds they took; None if it is missing or damaged."""
        path = self._path(shard)
        try:
            found = load_arrays(path)
            features, seconds = found["features"], float(found["seconds"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, OverflowError):
            features, seconds = np.empty(0), 0.0
        whole = (
            features.shape == (len(self.rows(shard)), *self.shape[1:])
            and features.dtype.kind == "f"
            # `write` refuses such numbers
            and np.isfinite(features).all()
            and 0 <= seconds <= MAX_SECONDS
        )
        if not whole:
            say(f"damaged, computed again: {path}")
            return None
        return features, seconds

    def write(self, shard: int, features: Features, seconds: float) -> None:
        """Write a shard."""
        if not np.isfinite(features).all():
            raise UserError(
                "the backbone's output is not finite: check its weights and its precision"
            )
        with _explain_cache_errors(), replace_file(self._path(shard)) as file:
            np.savez(file, features=features, seconds=seconds)

    def _path(self, shard: int) -> Path:
        return self.folder / f"{shard:05}.npz"

    @property
    def num_rows(self) -> int:
        """The rows that are on disk, by the names of the files alone."""
        # by the files and not by the shards: the shape of a damaged entry may announce any number
        names = [each.stem for each in self.folder.glob("*.npz")]
        present = [int(name) for name in names if name.isdecimal() and len(name) <= MAX_DIGITS]
        old = self.shape[0] if (self.folder / OLD_ARRAY_FILE).exists() else 0
        return max(old, sum(len(self.rows(shard)) for shard in present))

    @property
    def num_bytes(self) -> int:
        """The size on disk; another process may delete files meanwhile."""
        size = 0
        for each in self.folder.glob("*"):
            with suppress(OSError):
                size += each.stat().st_size
        return size

    @property
    def last_used(self) -> float:
        """Seconds since the epoch; 0 if the entry is gone."""
        try:
            return (self.folder / ABOUT_FILE).stat().st_mtime
        except OSError:
            return 0.0


def features_folder() -> Path:
    """The folder of all entries."""
    return cache_folder() / "features"


@contextmanager
def open_entry(key: Key, shape: tuple[int, ...]) -> Iterator[Entry]:
    """Yield the entry for `key`, created if need be; one process at a time holds it."""
    entry = Entry(folder=features_folder() / key.digest, key=key.fields, shape=shape)
    waiting = "waiting for another process that computes the same features"
    with file_lock(_lock_path(entry), waiting=waiting, hint=OTHER_FOLDER):
        with _explain_cache_errors():
            entry.folder.mkdir(parents=True, exist_ok=True)
            _split_old_array(entry)
            about = {"key": entry.key, "version": VERSION, "shape": list(shape)}
            # also marks it as used now
            replace_text(entry.folder / ABOUT_FILE, json.dumps(about))
        yield entry


def _lock_path(entry: Entry) -> Path:
    return Path(f"{entry.folder}.lock")


def _split_old_array(entry: Entry) -> None:
    """Turn an older version's single array into shards, if it is complete and undamaged."""
    path, about = entry.folder / OLD_ARRAY_FILE, _read_about(entry.folder) or {}
    if not path.exists():
        return
    if about.get("key") == entry.key:
        try:
            digest = digest_file(path)
            seconds = check_number(about.get("seconds", 0.0), "seconds", 0, MAX_SECONDS)
            if about.get("sha256") == digest:
                _write_shards(entry, np.load(path, mmap_mode="r", allow_pickle=False), seconds)
        # what is damaged is computed again
        except (OSError, ValueError, TypeError) as error:
            say(f"damaged, computed again: {path}: {first_line(error)}")
    path.unlink()


def _write_shards(entry: Entry, array: Any, seconds: float) -> None:
    for shard in range(entry.num_shards if array.shape == entry.shape else 0):
        rows = entry.rows(shard)
        part = np.asarray(array[rows.start : rows.stop])
        entry.write(shard, part, seconds * len(rows) / len(array))


@contextmanager
def _explain_cache_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"the feature cache {features_folder()} cannot be used: {error}; {OTHER_FOLDER}"
        ) from error


def _read_about(folder: Path) -> dict[str, Any] | None:
    try:
        found = parse_json(read_regular_file(folder / ABOUT_FILE, MAX_ABOUT_BYTES))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _read_entry(folder: Path) -> Entry | None:
    """The entry in a folder; None if there is none, or its description is damaged."""
    about = _read_about(folder) or {}
    key, shape = about.get("key"), about.get("shape")
    if not isinstance(key, dict) or not all(map(is_plain, key.values())):
        return None
    if not isinstance(shape, list) or not shape or len(shape) > MAX_DIMENSIONS:
        return None
    if not all(isinstance(side, int) and 0 <= side <= MAX_SIDE for side in shape):
        return None
    return Entry(folder=folder, key=key, shape=tuple(shape))


def _limit_bytes() -> int:
    text = os.environ.get("HAR_CACHE_GB", str(DEFAULT_LIMIT_GB))
    try:
        return int(float(text) * 1e9)
    except (ValueError, OverflowError) as error:
        raise UserError(f"HAR_CACHE_GB must be a number of gigabytes; received {text!r}") from error


def check_limit(needed: int) -> None:
    """Raise a UserError if `needed` bytes would not fit even an empty cache."""
    if needed > (limit := _limit_bytes()):
        raise UserError(
            f"the features need {format_bytes(needed, math.ceil)} and the cache may hold"
            f" {format_bytes(limit, math.floor)}: raise HAR_CACHE_GB, or use another loader"
        )


def make_room(entry: Entry, needed: int) -> None:
    """Delete the entries that were not used for longest until `needed` more bytes fit."""
    check_limit(needed)
    entries, limit = list_entries(), _limit_bytes()
    total = sum(each.num_bytes for each in entries)
    for oldest in sorted(entries, key=lambda each: each.last_used):
        if total + needed <= limit:
            break
        size = oldest.num_bytes
        # one in use stays, and the cache exceeds its limit until that one is free
        if oldest.folder != entry.folder and delete_entry(oldest):
            say(f"the feature cache is full: deleted {oldest.folder.name}")
            total -= size
    say(f"features: {format_bytes(needed)} to compute into {features_folder()}")
    with _explain_cache_errors():
        free = shutil.disk_usage(features_folder()).free
    if needed > free:
        raise UserError(
            f"the features need {format_bytes(needed, math.ceil)}, but"
            f" {format_bytes(free, math.floor)} are free in {features_folder()}: {OTHER_FOLDER}"
        )


def list_entries() -> list[Entry]:
    """List every entry, the last used first; folders without a valid about.json are no entries."""
    with _explain_cache_errors():
        folders = [each for each in features_folder().glob("*") if each.is_dir()]
    entries = [entry for each in folders if (entry := _read_entry(each))]
    return sorted(entries, key=lambda each: -each.last_used)


def delete_entry(entry: Entry) -> bool:
    """Delete an entry unless a process uses it; return whether it is gone."""
    try:
        with file_lock(_lock_path(entry), busy="in use"):
            shutil.rmtree(entry.folder, ignore_errors=True)
    except UserError:
        return False
    return not entry.folder.exists()


def clear_cache() -> int:
    """Delete every entry that no process uses; return how many bytes that freed."""
    sizes = [(each.num_bytes, delete_entry(each)) for each in list_entries()]
    return sum(size for size, deleted in sizes if deleted)


def describe_cache() -> str:
    """Describe the cache in one line, and each entry in another."""
    entries = list_entries()
    used = format_bytes(sum(each.num_bytes for each in entries))
    limit = format_bytes(_limit_bytes())
    head = f"{features_folder()}: {len(entries)} entries, {used} of {limit}"
    return "\n".join(map(for_terminal, [head, *map(_describe_entry, entries)]))


def _describe_entry(entry: Entry) -> str:
    rows, *shape = entry.shape
    key = dict.fromkeys((each.name for each in fields(Key)), "?") | entry.key
    state = "complete" if entry.num_rows == rows else f"{entry.num_rows:,} done"
    view = f" view {key['view']}" if key["augmentation"] not in ("none", "?") else ""
    layer = f" {key['layer']}" if entry.key.get("layer") else ""
    used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.last_used))
    return (
        f"{entry.folder.name[:12]}  {used}  {format_bytes(entry.num_bytes):>9}  {rows:,} x"
        f" {' x '.join(map(str, shape))}  {key['backbone']}{layer} {key['image_size']} px,"
        f" {key['runtime']} {key['arithmetic']}{view}, {state}"
    )
