"""Features on disk: each shard computed once, never used when damaged or of something else."""

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from filelock import FileLock

from har.training import feature_cache
from har.training.feature_cache import (
    ABOUT_FILE,
    OLD_ARRAY_FILE,
    VERSION,
    Features,
    Key,
    clear_cache,
    describe_cache,
    list_entries,
    make_room,
    open_entry,
)
from har.util import files
from har.util.errors import UserError

KEY = Key(
    images="a" * 64,
    backbone="efficientnet-lite0",
    weights="b" * 64,
    image_size=32,
    resize="bilinear",
    augmentation="none",
    view=0,
    seed=0,
    runtime="tensorflow 2",
    device="CPU",
    arithmetic="float32",
)
SHAPE = (10, 4)
WHOLE = np.repeat(np.arange(10, dtype=np.float32)[:, None], 4, axis=1)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of 4, 4 and 2 rows."""
    monkeypatch.setattr(feature_cache, "SHARD_ROWS", 4)


def fill(key: Key = KEY, stop_at: int = 3) -> list[int]:
    """Write the missing shards before `stop_at`; which were missing."""
    with open_entry(key, SHAPE) as entry:
        missing = [shard for shard in range(entry.num_shards) if entry.read(shard) is None]
        for shard in missing:
            if shard < stop_at:
                entry.write(shard, WHOLE[entry.rows(shard)], seconds=2.0)
    return missing


def load(key: Key = KEY) -> Features:
    with open_entry(key, SHAPE) as entry:
        found = [entry.read(shard) for shard in range(entry.num_shards)]
    assert all(each is not None and each[1] == 2.0 for each in found)
    return np.concatenate([each[0] for each in found if each is not None])


def folder_of(key: Key = KEY) -> Path:
    return feature_cache.features_folder() / key.digest


def shard_of(number: int) -> Path:
    return folder_of() / f"{number:05}.npz"


def test_a_shard_is_written_once_then_only_read() -> None:
    assert fill(stop_at=2) == [0, 1, 2]
    assert fill() == [2]
    assert fill() == []
    np.testing.assert_array_equal(load(), WHOLE)


@pytest.mark.parametrize(
    "change",
    [
        {"images": "c" * 64},
        {"backbone": "efficientnetb0"},
        {"weights": "c" * 64},
        {"image_size": 64},
        {"resize": "bicubic"},
        {"augmentation": "flip_rotate_zoom_contrast"},
        {"view": 1},
        {"seed": 1},
        {"runtime": "openvino 2"},
        {"device": "GPU"},
        {"arithmetic": "bfloat16"},
        {"layer": "block5a"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_whatever_features_depend_on_separates_them(change: dict) -> None:
    fill()
    assert fill(replace(KEY, **change)) == [0, 1, 2]


def test_a_whole_backbones_key_is_what_it_was_before_layers_were_cached() -> None:
    fields = asdict(KEY)
    del fields["layer"]
    text = json.dumps({"version": VERSION, **fields}, sort_keys=True)
    assert KEY.digest == hashlib.sha256(text.encode()).hexdigest()[:32]


def change_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[data.index(WHOLE[4:6].tobytes())] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a byte changed": change_a_byte,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-20]),
    "empty": lambda path: path.write_bytes(b""),
    "gone": Path.unlink,
    "of another shape": lambda path: np.savez(path, features=np.zeros((4, 5)), seconds=1.0),
    "without seconds": lambda path: np.savez(path, features=np.zeros((4, 4))),
    "a pickle": lambda path: np.savez(
        path, features=np.array([{}], dtype=object), seconds=1.0, allow_pickle=True
    ),
    "a text": lambda path: path.write_text("no zip"),
    "not finite": lambda path: np.savez(path, features=np.full((4, 4), np.nan), seconds=1.0),
    "of texts": lambda path: np.savez(path, features=np.full((4, 4), "1"), seconds=1.0),
    "of complex numbers": lambda path: np.savez(path, features=1j * np.ones((4, 4)), seconds=1.0),
    "endless seconds": lambda path: np.savez(path, features=WHOLE[4:8], seconds=np.inf),
    "seconds before": lambda path: np.savez(path, features=WHOLE[4:8], seconds=-1.0),
    "seconds of text": lambda path: np.savez(path, features=WHOLE[4:8], seconds="now"),
    "compressed": lambda path: np.savez_compressed(path, features=WHOLE[4:8], seconds=1.0),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "a device": lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_shard_alone_is_computed_again(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fill()
    DAMAGES[name](shard_of(1))
    assert fill() == [1]
    assert (f"damaged, computed again: {shard_of(1)}" in capsys.readouterr().err) is (
        name != "gone"
    )
    np.testing.assert_array_equal(load(), WHOLE)


def test_a_damaged_description_is_written_again() -> None:
    fill()
    for text in ('{"key": ', "[]", '{"key": {}, "version": 0}'):
        (folder_of() / ABOUT_FILE).write_text(text)
        assert fill() == [] and len(list_entries()) == 1
    (folder_of() / ABOUT_FILE).unlink()
    assert fill() == [] and len(list_entries()) == 1


# Descriptions that are not ours, and how many entries `har cache` lists.
ABOUTS = {
    "deep": ("[" * 100_000, 0),
    "a deep key": ('{"shape": [1], "key": ' + "[" * 50_000, 0),
    "a million of millions": ('{"key": {}, "shape": [1000000000, 1000000000]}', 1),
    "more rows than anything has": ('{"key": {}, "shape": [1000000000000000000, 4]}', 0),
    "negative": ('{"key": {}, "shape": [-5]}', 0),
    "no shape": ('{"key": {}, "shape": []}', 0),
    "a shape of texts": ('{"key": {}, "shape": ["9"]}', 0),
    "a number": ('{"key": {}, "shape": 9}', 0),
    "a key of lists": ('{"key": {"view": [1]}, "shape": [9]}', 0),
    "a key of text": ('{"key": "key", "shape": [9]}', 0),
    "a long text": ('{"key": {"backbone": "' + "x" * 10**6 + '"}, "shape": [9]}', 0),
    "5,000 digits": ('{"key": {}, "shape": [' + "9" * 5000 + "]}", 0),
}


@pytest.mark.parametrize("name", ABOUTS)
def test_a_hostile_description(name: str) -> None:
    text, entries = ABOUTS[name]
    fill()
    (folder_of() / ABOUT_FILE).write_text(text)
    assert len(describe_cache().splitlines()) == 1 + entries
    assert fill() == [] and len(list_entries()) == 1


@pytest.mark.parametrize("target", ["pipe", "/dev/zero", "/dev/full"])
def test_a_description_that_is_no_file(target: str) -> None:
    fill()
    (folder_of() / ABOUT_FILE).unlink()
    if target == "pipe":
        os.mkfifo(folder_of() / ABOUT_FILE)
    else:
        (folder_of() / ABOUT_FILE).symlink_to(target)
    assert "0 entries" in describe_cache()
    assert fill() == [] and len(list_entries()) == 1


def write_old(**changes: object) -> None:
    """An entry as older versions wrote it: one array, and its digest in about.json."""
    folder_of().mkdir(parents=True)
    np.save(folder_of() / OLD_ARRAY_FILE, WHOLE)
    digest = hashlib.sha256((folder_of() / OLD_ARRAY_FILE).read_bytes()).hexdigest()
    key = {name: value for name, value in asdict(KEY).items() if name != "layer"}
    about = {"key": key, "version": 2, "shape": [10, 4], "seconds": 5.0, "done": 10}
    (folder_of() / ABOUT_FILE).write_text(json.dumps(about | {"sha256": digest} | changes))


def test_an_entry_of_an_older_version_is_used() -> None:
    write_old()
    assert "10 x 4" in describe_cache() and "complete" in describe_cache()
    with open_entry(KEY, SHAPE) as entry:
        found = [entry.read(shard) for shard in range(entry.num_shards)]
    np.testing.assert_array_equal(np.concatenate([each[0] for each in found if each]), WHOLE)
    assert sum(each[1] for each in found if each) == pytest.approx(5.0)
    assert not (folder_of() / OLD_ARRAY_FILE).exists()


@pytest.mark.parametrize(
    "changes",
    [{"sha256": "0" * 64}, {"sha256": None}, {"key": {}}, {"seconds": "five"}, {"seconds": -1}],
    ids=str,
)
def test_an_invalid_entry_of_an_older_version_is_computed_again(changes: dict) -> None:
    write_old(**changes)
    assert fill() == [0, 1, 2]
    assert not (folder_of() / OLD_ARRAY_FILE).exists()


@pytest.mark.parametrize("wrong", [np.inf, np.nan])
def test_features_that_are_not_finite_are_refused(wrong: float) -> None:
    with open_entry(KEY, SHAPE) as entry, pytest.raises(UserError, match="not finite"):
        entry.write(0, np.full((4, 4), wrong, np.float32), 1.0)
    assert fill() == [0, 1, 2]


def test_a_full_disk_is_an_error_and_leaves_no_part(monkeypatch: pytest.MonkeyPatch) -> None:
    fill(stop_at=1)
    with open_entry(KEY, SHAPE) as entry, monkeypatch.context() as patch:

        def refuse(*_: object) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr(files.os, "fsync", refuse)
        message = "No space left on device; set HAR_CACHE"
        with pytest.raises(UserError, match=message):
            entry.write(1, WHOLE[4:8], 1.0)
    assert sorted(path.name for path in folder_of().iterdir()) == ["00000.npz", ABOUT_FILE]


def test_too_little_free_disk_is_said_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_entry(KEY, SHAPE) as entry:
        full = SimpleNamespace(free=100)
        monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda _: full)
        with pytest.raises(UserError, match="need 160 kB, but 100 bytes are free"):
            make_room(entry, 160_000)


def test_two_at_once_compute_once() -> None:
    together = threading.Barrier(2)

    def ask(_: int) -> list[int]:
        together.wait()
        return fill()

    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(ask, range(2))) == [[], [0, 1, 2]]


def test_the_least_recently_used_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [replace(KEY, seed=seed) for seed in range(3)]
    for key in (*keys[:2], keys[0]):  # used again: now the second is the oldest
        fill(key)
        time.sleep(0.02)  # what file systems tell apart
    size = list_entries()[0].num_bytes
    monkeypatch.setenv("HAR_CACHE_GB", str(2.5 * size / 1e9))
    with open_entry(keys[2], SHAPE) as entry:
        make_room(entry, size)
    assert [folder_of(key).exists() for key in keys] == [True, False, True]


def test_more_than_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_entry(KEY, SHAPE) as entry:
        monkeypatch.setenv("HAR_CACHE_GB", "0.0000001")
        with pytest.raises(UserError, match="raise HAR_CACHE_GB"):
            make_room(entry, 160)
        for text in ("many", "inf", "nan"):
            monkeypatch.setenv("HAR_CACHE_GB", text)
            with pytest.raises(UserError, match=r"HAR_CACHE_GB must be a number .* received"):
                make_room(entry, 160)


def test_a_cache_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("HAR_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set HAR_CACHE to another folder"):
        fill()


def test_listed_and_cleared_but_for_what_is_in_use() -> None:
    fill(replace(KEY, seed=1, augmentation="flip_rotate_zoom_contrast"), stop_at=2)
    fill(replace(KEY, layer="block5a"))
    fill()
    text = describe_cache()
    assert "3 entries" in text and "10 x 4" in text and "lite0 block5a 32 px" in text
    assert "complete" in text and "view 0, 8 done" in text
    with FileLock(f"{folder_of()}.lock"):
        assert clear_cache() > 0
        (left,) = list_entries()
    assert left.folder == folder_of()
    clear_cache()
    (feature_cache.features_folder() / "foreign").mkdir()
    (feature_cache.features_folder() / "foreign" / ABOUT_FILE).write_text('{"x": 1}')
    assert list_entries() == [] and "0 entries" in describe_cache()
