"""Images and their thumbnails: only regular files inside the data folder are read."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from har.data.images import ImageError, read_image
from har.data.pictures import thumbnail, thumbnail_uri
from tests.data.making import encode, gradient

JPEG = encode(gradient())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data folder with one image, beside another folder with one."""
    for name in ("data", "elsewhere"):
        (tmp_path / name / "class").mkdir(parents=True)
        (tmp_path / name / "class" / "a.jpg").write_bytes(JPEG)
    return tmp_path / "data"


def link(name: str, target: str) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        (folder / name).symlink_to(target)
        return folder / name

    return build


def below(folder_name: str, target: str) -> Callable[[Path], Path]:
    return lambda folder: link(folder_name, target)(folder) / "a.jpg"


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe.jpg")
    return folder / "pipe.jpg"


def written(data: bytes) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        (folder / "b.jpg").write_bytes(data)
        return folder / "b.jpg"

    return build


def film(folder: Path) -> Path:
    with (folder / "film.jpg").open("wb") as file:
        file.truncate(30_000_000_000)
    return folder / "film.jpg"


OUT = "a link out of the data folder"
REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "link to a file elsewhere": (link("b.jpg", "../elsewhere/class/a.jpg"), OUT),
    "link to a system file": (link("b.jpg", "/etc/hostname"), OUT),
    "link to a link": (lambda f: link("c.jpg", str(link("b.jpg", "/etc/hostname")(f)))(f), OUT),
    "file in a linked folder": (below("linked", "../elsewhere/class"), OUT),
    "path that leaves": (lambda folder: folder / "../elsewhere/class/a.jpg", OUT),
    "absolute path": (lambda folder: folder / "/etc/hostname", OUT),
    "link to a device": (link("b.jpg", "/dev/zero"), OUT),
    "link to nothing": (link("b.jpg", "nothing"), "no such file"),
    "link to itself": (link("b.jpg", "b.jpg"), "no such file"),
    "no file": (lambda folder: folder / "nothing.jpg", "no such file"),
    "file below a file": (lambda folder: folder / "class" / "a.jpg" / "b.jpg", "no such file"),
    "name with a zero byte": (lambda folder: folder / "a\0.jpg", "no such file"),
    "name that is too long": (lambda folder: folder / ("a" * 300), "cannot be read: File name too"),
    "folder": (lambda folder: folder / "class", "not a file"),
    "pipe": (pipe, "not a file"),
    "link to a pipe": (lambda folder: link("b.jpg", pipe(folder).name)(folder), "not a file"),
    "empty file": (written(b""), "0 bytes"),
    "film": (film, "30,000,000,000 bytes, more than 60,000,000"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_image_of_the_folder_is_not_read(name: str, folder: Path) -> None:
    build, message = REFUSED[name]
    path = build(folder)
    with pytest.raises(ImageError, match=message):
        read_image(path, inside=folder)
    relative = os.path.relpath(path, folder) if "\0" not in str(path) else str(path)
    assert thumbnail(folder, relative) is None and thumbnail_uri(folder, relative) == ""


ACCEPTED: dict[str, Callable[[Path], Path]] = {
    "file": lambda folder: folder / "class" / "a.jpg",
    "link inside": link("b.jpg", "class/a.jpg"),
    "linked class": below("linked", "class"),
    "through a link to the folder": lambda folder: link("../mount", "data")(folder) / "class/a.jpg",
    "dots that stay": lambda folder: folder / "class" / ".." / "class" / "a.jpg",
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_links_that_stay_are_followed(name: str, folder: Path) -> None:
    path = ACCEPTED[name](folder)
    assert read_image(path, inside=folder) == read_image(path) == JPEG


def test_the_folder_itself_may_be_a_link(folder: Path) -> None:
    mount = link("../mount", "data")(folder)
    assert read_image(mount / "class" / "a.jpg", inside=mount) == JPEG
    found = thumbnail(mount, "class/a.jpg", 16)
    assert found is not None and found.size == (16, 12)


def test_without_proc_links_are_resolved_by_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: str) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(os, "readlink", fail)
    assert read_image(folder / "class" / "a.jpg", inside=folder) == JPEG


def test_links_are_followed_where_no_folder_is_given(folder: Path) -> None:
    assert read_image(link("b.jpg", "../elsewhere/class/a.jpg")(folder)) == JPEG
