"""Features on disk: made once, gone on with, never used when cut, changed or of something else."""

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from har.training import feature_cache
from har.training.feature_cache import (
    ABOUT_FILE,
    ARRAY_FILE,
    Features,
    Key,
    clear_cache,
    describe_cache,
    list_entries,
    load_or_compute,
)
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


class Work:
    """Fills an array with the numbers of its rows; remembers from where it was asked to."""

    def __init__(self, stop_at: int | None = None, error: type[BaseException] = KeyboardInterrupt):
        self.stop_at, self.error = stop_at, error
        self.asked: list[int] = []

    def __call__(self, array: Features, done: int, keep: Callable[[int], None]) -> None:
        self.asked.append(done)
        for row in range(done, len(array)):
            if row == self.stop_at:
                raise self.error
            array[row] = row
            keep(row + 1)


def load(work: Work, key: Key = KEY, shape: tuple[int, int] = SHAPE) -> tuple[np.ndarray, int]:
    found = load_or_compute(key, shape, work)
    return found.array, found.computed


def folder_of(key: Key = KEY) -> Path:
    return feature_cache.features_folder() / key.digest


def assert_whole(found: tuple[np.ndarray, int], computed: int) -> None:
    array, count = found
    assert count == computed
    np.testing.assert_array_equal(array, np.repeat(np.arange(10.0)[:, None], 4, axis=1))


def test_made_once_then_only_read() -> None:
    work = Work()
    assert_whole(load(work), 10)
    assert_whole(load(work), 0)
    assert work.asked == [0]
    array, _ = load(work)
    assert isinstance(array, np.memmap) and not array.flags.writeable


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
    ],
    ids=lambda change: next(iter(change)),
)
def test_whatever_features_depend_on_parts_them(change: dict) -> None:
    work = Work()
    load(work)
    assert_whole(load(work, replace(KEY, **change)), 10)
    assert work.asked == [0, 0]


def test_what_is_found_says_how_long_it_had_taken() -> None:
    def slowly(array: Features, done: int, keep: Callable[[int], None]) -> None:
        for row in range(done, min(done + 5, len(array))):
            time.sleep(0.02)
            array[row] = row
            keep(row + 1)
        if done < 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_or_compute(KEY, SHAPE, slowly)
    half = load_or_compute(KEY, SHAPE, slowly)
    assert half.computed == 5 and half.saved_s >= 0.1
    whole = load_or_compute(KEY, SHAPE, slowly)
    assert whole.computed == 0 and whole.saved_s >= half.saved_s + 0.1
    assert load_or_compute(replace(KEY, view=1), (5, 4), slowly_whole).saved_s == 0


def slowly_whole(array: Features, done: int, keep: Callable[[int], None]) -> None:
    array[:] = 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, MemoryError])
def test_interrupted_work_goes_on_where_it_stood(error: type[BaseException]) -> None:
    with pytest.raises(error):
        load(Work(stop_at=7, error=error))
    assert json.loads((folder_of() / ABOUT_FILE).read_text())["done"] == 7
    work = Work()
    assert_whole(load(work), 3)
    assert work.asked == [7]


def damage_array(folder: Path) -> None:
    data = bytearray((folder / ARRAY_FILE).read_bytes())
    data[-3] ^= 1
    (folder / ARRAY_FILE).write_bytes(data)


def cut_array(folder: Path) -> None:
    data = (folder / ARRAY_FILE).read_bytes()
    (folder / ARRAY_FILE).write_bytes(data[:-20])


def edit_about(folder: Path, **changes: object) -> None:
    about = json.loads((folder / ABOUT_FILE).read_text())
    (folder / ABOUT_FILE).write_text(json.dumps({**about, **changes}))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a bit of the array": damage_array,
    "the array cut": cut_array,
    "the array emptied": lambda folder: (folder / ARRAY_FILE).write_bytes(b""),
    "the array gone": lambda folder: (folder / ARRAY_FILE).unlink(),
    "the array of another shape": lambda folder: np.save(
        folder / ARRAY_FILE, np.zeros((10, 5), np.float32)
    ),
    "the array of another type": lambda folder: np.save(folder / ARRAY_FILE, np.zeros(SHAPE)),
    "a pickle": lambda folder: np.save(
        folder / ARRAY_FILE, np.array([{}], dtype=object), allow_pickle=True
    ),
    "about.json gone": lambda folder: (folder / ABOUT_FILE).unlink(),
    "about.json cut": lambda folder: (folder / ABOUT_FILE).write_text('{"key": '),
    "about.json a list": lambda folder: (folder / ABOUT_FILE).write_text("[]"),
    "another version": lambda folder: edit_about(folder, version=0),
    "of other images": lambda folder: edit_about(folder, key={**vars(KEY), "images": "x"}),
    "another digest": lambda folder: edit_about(folder, sha256="0" * 64),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_not_sound_is_made_anew(name: str) -> None:
    load(Work())
    DAMAGES[name](folder_of())
    work = Work()
    assert_whole(load(work), 10)
    assert work.asked == [0]
    assert_whole(load(work), 0)


def test_a_cut_array_is_not_gone_on_with() -> None:
    with pytest.raises(KeyboardInterrupt):
        load(Work(stop_at=7))
    cut_array(folder_of())
    assert_whole(load(Work()), 10)


def test_numbers_that_are_none_are_refused_and_not_kept() -> None:
    def compute(array: Features, done: int, keep: Callable[[int], None]) -> None:
        array[:] = np.inf
        keep(len(array))

    for _ in range(2):
        with pytest.raises(UserError, match="not finite"):
            load_or_compute(KEY, SHAPE, compute)
        assert list_entries() == []


def test_rows_that_were_never_sealed_are_checked_before_use() -> None:
    """As after a kill between the last row and the digest."""
    load(Work())
    about = json.loads((folder_of() / ABOUT_FILE).read_text())
    del about["sha256"]
    (folder_of() / ABOUT_FILE).write_text(json.dumps(about))
    work = Work()
    assert_whole(load(work), 0)
    assert work.asked == [] and list_entries()[0].complete
    # and still say how long they took
    assert list_entries()[0].about["seconds"] == about["seconds"] > 0
    del about["done"]
    array = np.load(folder_of() / ARRAY_FILE)
    array[3, 1] = np.nan
    np.save(folder_of() / ARRAY_FILE, array)
    (folder_of() / ABOUT_FILE).write_text(json.dumps({**about, "done": 10}))
    with pytest.raises(UserError, match="not finite"):
        load(Work())
    assert_whole(load(Work()), 10)


def test_a_full_disk_is_said_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", refuse)
    work = Work()
    with pytest.raises(UserError, match="No space left on device; set HAR_CACHE"):
        load(work)
    assert work.asked == [] and not folder_of().exists()
    monkeypatch.undo()


def test_a_process_killed_while_it_makes_room_leaves_what_can_be_cleared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.posix_fallocate", killed)
    with pytest.raises(KeyboardInterrupt):
        load(Work())
    (entry,) = list_entries()
    assert entry.folder == folder_of() and not entry.complete
    assert clear_cache() > 0 and not folder_of().exists()


def test_errors_of_the_work_are_not_the_caches() -> None:
    def compute(array: Features, done: int, keep: Callable[[int], None]) -> None:
        raise FileNotFoundError("an image")

    with pytest.raises(FileNotFoundError, match="an image"):
        load_or_compute(KEY, SHAPE, compute)


def test_two_at_once_compute_once() -> None:
    together = threading.Barrier(2)
    works = [Work(), Work()]

    def ask(work: Work) -> tuple[np.ndarray, int]:
        together.wait()
        return load(work)

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(ask, works))
    assert sorted(count for _, count in found) == [0, 10]
    assert sorted(len(work.asked) for work in works) == [0, 1]


def test_the_oldest_gives_way_under_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    def use(key: Key) -> None:
        load_or_compute(key, (1000, 16), lambda array, done, keep: array.fill(1))
        time.sleep(0.02)  # what file systems tell apart

    keys = [replace(KEY, seed=seed) for seed in range(3)]
    for key in (*keys[:2], keys[0]):  # used again: now the second is the oldest
        use(key)
    each = list_entries()[0].bytes
    monkeypatch.setenv("HAR_CACHE_GB", str(2.5 * each / 1e9))
    use(keys[2])
    assert [folder_of(key).exists() for key in keys] == [True, False, True]


def test_more_than_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAR_CACHE_GB", "0.0000001")
    with pytest.raises(UserError, match="raise HAR_CACHE_GB"):
        load(Work())
    for text in ("many", "inf", "nan"):
        monkeypatch.setenv("HAR_CACHE_GB", text)
        with pytest.raises(UserError, match="HAR_CACHE_GB must be a number of gigabytes; received"):
            load(Work())


def test_a_cache_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("HAR_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set HAR_CACHE to another folder"):
        load(Work())


def test_listed_and_cleared_but_for_what_is_at_work() -> None:
    with pytest.raises(KeyboardInterrupt):
        load(Work(stop_at=7), replace(KEY, seed=1, augmentation="flip_rotate_zoom_contrast"))
    load(Work())
    text = describe_cache()
    assert "2 entries" in text and "10 x 4" in text
    assert "complete" in text and "view 0, 7 done" in text
    with FileLock(f"{folder_of()}.lock"):
        assert clear_cache() > 0
        (left,) = list_entries()
    assert left.folder == folder_of()
    clear_cache()
    (feature_cache.features_folder() / "foreign").mkdir()
    (feature_cache.features_folder() / "foreign" / ABOUT_FILE).write_text('{"x": 1}')
    assert list_entries() == [] and "0 entries" in describe_cache()
