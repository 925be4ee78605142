"""Data at a URL: copied once, kept up to date, and never written outside of its folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from har.data import download
from har.data.download import download_folder
from har.data.sources import find_source
from har.util.errors import UserError
from har.util.places import Url, list_stored, walk_files
from tests.util.test_places import fsspec, write
from tests.util.test_places import memory as memory

FILES = {"run/1.jpg": b"one", "run/2.jpg": b"two", "sit down/deep/3.jpg": b"three"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HAR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def url(memory: Url) -> Url:
    for name, data in FILES.items():
        write(memory / name, data)
    return memory


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@contextmanager
def reads(monkeypatch: pytest.MonkeyPatch, fail: str = "") -> Iterator[list[str]]:
    """Names of the files that are read in the block; those with `fail` in them cannot be read."""
    read, seen = download.read_start, []

    def note(place: Url, most: int) -> bytes:
        seen.append(str(place).removeprefix("memory://bucket/folder/"))
        if fail and fail in str(place):
            raise OSError("the network is down")
        return read(place, most)

    with monkeypatch.context() as patch:
        patch.setattr(download, "read_start", note)
        yield seen


def test_a_folder_is_copied_once(url: Url, monkeypatch: pytest.MonkeyPatch) -> None:
    write(url / ".hidden", b"x")
    with reads(monkeypatch) as seen:
        folder = download_folder(url)
    assert folder.name == "folder" and contents(folder) == FILES
    assert sorted(seen) == sorted(FILES)
    with reads(monkeypatch) as seen:
        assert download_folder(Url(f"{url}/")) == folder
    assert seen == []


def test_the_copy_follows_the_folder(url: Url, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = download_folder(url)
    # as large as before: its version tells
    write(url / "run/1.jpg", b"new")
    write(url / "run/4.jpg", b"four")
    fsspec.filesystem("memory").rm("/bucket/folder/sit down/deep/3.jpg")
    with reads(monkeypatch) as seen:
        after = download_folder(url)
    assert contents(after) == {"run/1.jpg": b"new", "run/2.jpg": b"two", "run/4.jpg": b"four"}
    assert sorted(seen) == ["run/1.jpg", "run/4.jpg"]
    assert not (after / "sit down").exists() and after.name == folder.name
    # a training may be reading it
    assert contents(folder) == FILES
    assert (after / "run/2.jpg").samefile(folder / "run/2.jpg")


def test_a_file_that_was_cut_is_read_again(url: Url, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = download_folder(url)
    (folder / "run/2.jpg").write_bytes(b"c")
    with reads(monkeypatch) as seen:
        assert contents(download_folder(url)) == FILES
    assert seen == ["run/2.jpg"]


def test_copies_are_listed(url: Url, cli: Any) -> None:
    assert "elsewhere" not in cli("cache").output
    download_folder(url)
    said = cli("cache", "--clear").output
    assert "1 data folders from elsewhere" in said and str(url) in said
    assert contents(download_folder(url)) == FILES


def test_what_failed_is_named_and_tried_again(url: Url, monkeypatch: pytest.MonkeyPatch) -> None:
    said = r"1 of 3 files of memory://.* such as run/2.jpg: the network is down; the others stay"
    with reads(monkeypatch, fail="2.jpg"), pytest.raises(UserError, match=said):
        download_folder(url)
    with reads(monkeypatch) as seen:
        assert contents(download_folder(url)) == FILES
    assert seen == ["run/2.jpg"]


def test_an_interruption_loses_no_file(url: Url, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "READERS", 1)
    for number in range(40):
        write(url / f"walk/{number:02}.jpg", b"x")

    def stop(place: Url, most: int) -> bytes:
        if str(place).endswith("30.jpg"):
            raise KeyboardInterrupt
        return b"x"

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        for name in FILES:
            fsspec.filesystem("memory").rm(f"/bucket/folder/{name}")
        patch.setattr(download, "read_start", stop)
        download_folder(url)
    # a process that is killed while it writes
    (journal,) = download.cache_folder().glob("downloads/*/*/journal.jsonl")
    journal.write_text(f'{journal.read_text()}["walk/3')
    with reads(monkeypatch) as seen:
        download_folder(url)
    # the journal has the files before; a batch in which one raised is read again
    assert set(seen) < {f"walk/{number:02}.jpg" for number in range(40)} and len(seen) <= 24


ODD = ["../out.jpg", "run/../../out.jpg", "a//b.jpg", "a::b.jpg", "a/" * 40 + "b.jpg", "b" * 3000]


@pytest.mark.parametrize("name", ODD, ids=range(len(ODD)))
def test_a_name_that_leaves_the_folder(name: str, url: Url, cache: Path) -> None:
    files = fsspec.filesystem("memory")
    files.store[f"/bucket/folder/{name}"] = files.store["/bucket/folder/run/2.jpg"]
    # an odd path of a store is refused before anything is written
    with pytest.raises(UserError, match=r"has the file '.*: rename it"):
        download_folder(url)
    assert not list(cache.rglob("*.jpg"))


def test_a_file_and_a_folder_of_one_name(url: Url, cache: Path) -> None:
    files = fsspec.filesystem("memory")
    files.store["/bucket/folder/run/1.jpg/x.jpg"] = files.store["/bucket/folder/run/2.jpg"]
    with pytest.raises(UserError, match=r"has the file 'run/1.jpg', and a folder of that name"):
        download_folder(url)


def test_an_empty_file(url: Url) -> None:
    write(url / "run/0.jpg", b"")
    assert contents(download_folder(url)) == FILES | {"run/0.jpg": b""}


def test_a_folder_above_the_copy_is_never_its_name(memory: Url, cache: Path) -> None:
    for name in ("..", ".ssh"):
        write(Url(f"memory://bucket/{name}/1.jpg"), b"x")
    for name in ("..", ".ssh"):
        try:
            folder = download_folder(Url(f"memory://bucket/{name}"))
        except UserError:
            continue
        assert folder.name == "data" and folder.parents[2] == cache.resolve() / "downloads"


@pytest.mark.parametrize("sent", [b"tw", b"two and more"])
def test_a_store_that_sends_another_size(sent: bytes, url: Url, monkeypatch: Any) -> None:
    monkeypatch.setattr(download, "read_start", lambda place, most: sent[:most])
    with pytest.raises(UserError, match=r"3 of 3 files .* bytes came, not 3; did it change"):
        download_folder(url)


def test_a_large_file_is_read_in_blocks(memory: Url, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "AT_ONCE_BYTES", 10)
    write(memory / "a.jpg", bytes(range(95)))
    with reads(monkeypatch) as seen:
        assert contents(download_folder(memory)) == {"a.jpg": bytes(range(95))}
    assert seen == []


def test_what_cannot_be_downloaded(url: Url, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="a web server does not list its files: download it"):
        find_source("https://example.org/data")
    with pytest.raises(UserError, match=r"1.jpg is a file: give the folder it lies in"):
        find_source(f"{url}/run/1.jpg")
    with pytest.raises(UserError, match="no files there, or no such folder"):
        find_source("memory://bucket/nothing")
    with pytest.raises(UserError, match=r"ftp:// is not read here, but s3://"):
        find_source("ftp://example.org/data")
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: type("", (), {"free": 4}))
    with pytest.raises(UserError, match=r"needs 11 bytes more .* 4 bytes are free: set HAR_CACHE"):
        find_source(str(url))


def test_a_training_names_it(url: Url, monkeypatch: pytest.MonkeyPatch) -> None:
    source = find_source(str(url))
    assert source.name == "folder" and source.layout == "class_folders"
    assert source.why == f"--data {url}"
    monkeypatch.setenv("HAR_DATA", str(url))
    assert find_source("auto").root == source.root


def test_a_store_says_when_a_file_changed(url: Url) -> None:
    before = list_stored(url)
    write(url / "run/1.jpg", b"new")
    after = list_stored(url)
    assert [path for path in after if after[path] != before[path]] == ["run/1.jpg"]
    assert after["run/1.jpg"].size == 3


def test_a_folder_that_cannot_be_listed_is_not_left_out(tmp_path: Path) -> None:
    files = fsspec.filesystem("file")
    for name in ("a/1.jpg", "a/b/2.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert sorted(walk_files(files, str(tmp_path))) == [
        str(tmp_path / name) for name in ("a/1.jpg", "a/b/2.jpg")
    ]
    assert list(walk_files(files, str(tmp_path / "a/1.jpg"))) == [str(tmp_path / "a/1.jpg")]

    class Refusing(type(files)):  # type: ignore[misc]
        def ls(self, path: str, detail: bool = False, **options: Any) -> Any:
            if path.endswith("/b"):
                raise PermissionError(path)
            return super().ls(path, detail, **options)

    with pytest.raises(PermissionError):
        walk_files(Refusing(), str(tmp_path))
