"""The files of a folder: inside it, regular, and meant as data."""

import os
import time
from pathlib import Path

import pytest

from har.data.folders import check_files, find_file_kind, is_hidden, list_files


def touch(*files: Path) -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    touch(root / "b.jpg", root / "a" / "deep" / "er.jpg", tmp_path / "secret")
    return root


def test_files_at_any_depth_in_order(folder: Path) -> None:
    assert list(list_files(folder).files) == ["a/deep/er.jpg", "b.jpg"]
    assert list_files(folder).below("a") == ["a/deep/er.jpg"]
    assert list_files(folder).files["b.jpg"].st_size == 1


LINKS = {
    "../secret": "a link out of the data folder",
    "/etc/passwd": "a link out of the data folder",
    "/dev/zero": "a link out of the data folder",
    "..": "a link out of the data folder",
    "nothing": "no such file",
    "link": "",
    ".": "a link to a folder above it, or more than 32 folders deep",
}


@pytest.mark.parametrize(("target", "reason"), LINKS.items())
def test_links(folder: Path, target: str, reason: str) -> None:
    (folder / "link").symlink_to(target)
    listing = list_files(folder)
    assert list(listing.files) == ["a/deep/er.jpg", "b.jpg"]
    assert reason in listing.refused["link"]


def test_links_that_stay_inside(folder: Path) -> None:
    (folder / "link.jpg").symlink_to("a/deep/er.jpg")
    (folder / "again").symlink_to("a")
    assert list(list_files(folder).files) == [
        "a/deep/er.jpg", "again/deep/er.jpg", "b.jpg", "link.jpg"
    ]  # fmt: skip


def test_pipes_and_devices(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    assert list_files(folder).refused == {"pipe": "not a file"}
    started = time.monotonic()
    assert find_file_kind(folder / "pipe") == ""
    assert time.monotonic() - started < 1


def test_links_that_multiply_end(folder: Path) -> None:
    """Each folder links to the others: as many paths as there are orders of them."""
    for name in "abcdefgh":
        (folder / name).mkdir(exist_ok=True)
        for other in "abcdefgh":
            (folder / name / f"to-{other}").symlink_to(f"../{other}")
    started = time.monotonic()
    listing = list_files(folder)
    assert time.monotonic() - started < 20 and "b.jpg" in listing.files


@pytest.mark.parametrize(
    "name", [".git", "__MACOSX", "Thumbs.db", "DESKTOP.INI", "@eaDir", "._x.jpg", "Icon\r"]
)
def test_hidden(name: str) -> None:
    assert is_hidden(name) and not is_hidden(f"x{name}")


def test_checked_files(folder: Path) -> None:
    (folder / "out").symlink_to("/etc")
    (folder / "out.jpg").symlink_to("../secret")
    os.mkfifo(folder / "pipe")
    paths = ["b.jpg", "out/passwd", "out.jpg", "../secret", "/dev/zero", "pipe", "gone", "a"]
    found = list(check_files(folder, paths))
    assert found[0] == 1
    assert all(isinstance(each, str) for each in found[1:])
    assert found[1] == found[2] == "is a link out of the data folder"
    assert found[3] == found[4] == "is out of the data folder: paths must stay inside"
    assert found[5] == found[7] == "is not a file" and found[6].startswith("is gone")
