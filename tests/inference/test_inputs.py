"""The images to score, wherever they are: the same rows for the same images."""

import csv
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from har.inference import inputs
from har.inference.inputs import find_inputs, read_inputs
from har.inference.predict import predict_to_file
from har.util import places
from har.util.errors import UserError
from har.util.places import Url, parse_place, replace_place
from tests.util.test_places import memory as memory

IMAGES = {f"{n:02}.jpg": b"image" * n for n in range(40)} | {
    "sub/=a b.PNG": b"x",
    "café.webp": b"y",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of images, one of which is empty."""
    for name, data in IMAGES.items():
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "images"


def write(place: Url, data: bytes) -> None:
    with replace_place(place) as file:
        file.write(data)


def classify(contents: Sequence[bytes]) -> list[dict]:
    return [
        {"label": f"size {len(data)}", "probability": 0.5, "top_3": [], "error": None}
        for data in contents
    ]


def score(data: Any, out: Path) -> list[dict[str, str]]:
    predict_to_file(data, find_inputs(data), out, classify, "m")
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    out.unlink()
    return rows


def test_the_same_images_have_the_same_rows(folder: Path, memory: Url, tmp_path: Path) -> None:
    out = tmp_path / "p.csv"
    local = score(folder, out)
    assert len(local) == 42 and local[0]["error"] == "empty: 0 bytes"
    assert local[-2]["filename"] == "café.webp" and local[-1]["filename"] == "sub/=a b.PNG"
    for name, data in IMAGES.items():
        write(memory / name, data)
    assert score(memory, out) == local
    assert score(parse_place(folder.as_uri()), out) == local
    lines = "\n".join(sorted(IMAGES)) + "\n"
    table = "number;path\n" + "".join(f"{n};{name}\n" for n, name in enumerate(sorted(IMAGES)))
    for name, text in (("list.txt", lines), ("list.csv", table)):
        (folder / name).write_text(text)
        assert score(folder / name, out) == local
        write(memory / name, text.encode())
        assert score(memory / name, out) == local
    columns = {"image": [IMAGES[n] for n in sorted(IMAGES)], "filename": sorted(IMAGES)}
    parquet.write_table(pa.table(columns), folder / "t.parquet", row_group_size=9)
    assert score(folder / "t.parquet", out) == local
    write(memory / "t.parquet", (folder / "t.parquet").read_bytes())
    assert score(memory / "t.parquet", out) == local


def test_elsewhere_names_alone_tell_what_is_an_image(
    memory: Url, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (
        "b.jpg",
        "a.TIFF",
        "no",
        "n\x1b.txt",
        ".hidden/c.jpg",
        "__MACOSX/d.jpg",
        "s/e.png",
    ):
        write(memory / name, b"\xff\xd8\xff\xe0")
    monkeypatch.setattr(inputs, "read_start", None)
    assert list(find_inputs(memory)) == ["a.TIFF", "b.jpg", "s/e.png"]
    assert "warning: 2 files are no images: n\\x1b.txt, no" in capsys.readouterr().err
    assert find_inputs(memory / "b.jpg") == {"b.jpg": memory / "b.jpg"}
    with pytest.raises(UserError, match="no images in memory://bucket/gone: no files"):
        find_inputs(memory.with_name("gone"))
    with pytest.raises(UserError, match=r"no images in .*: 1 other files, such as c"):
        write(memory / "other/c", b"")
        find_inputs(memory / "other")
    with pytest.raises(UserError, match="a web server does not list its files: give a list"):
        find_inputs(Url("https://host/photos"))


def test_what_cannot_be_listed_is_said(memory: Url, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Url) -> list[str]:
        raise OSError("Access Denied")

    monkeypatch.setattr(inputs, "list_below", refuse)
    with pytest.raises(UserError, match="memory://bucket/folder cannot be listed: Access Denied"):
        find_inputs(memory)


def test_each_entry_of_a_list_is_read_or_has_its_error(
    folder: Path, memory: Url, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(memory / "a.jpg", b"far")
    strange = os.fsdecode(b"caf\xe9.jpg")
    (folder / strange).write_bytes(b"strange")
    entries = {
        "01.jpg": b"image",
        f"{folder}/02.jpg": b"image" * 2,
        (folder / "03.jpg").as_uri(): b"image" * 3,
        f"{memory}/a.jpg": b"far",
        strange: b"strange",
        f"{memory}/gone.jpg": "no such file",
        "gone.jpg": "no such file",
        "sub": "not a file",
        "00.jpg": "empty: 0 bytes",
        "odd://host/a.jpg": "odd:// is not read here, but s3://",
        "zip://a.jpg::memory://bucket/a.zip": "must not have '::'",
        "simplecache::memory://bucket/folder/a.jpg": "must not have '::'",
        f"{memory}/a.jpg::zip://b": "must not have '::'",
        "file://host/a.jpg": "file:// is not read here",
        "01.jpg\0": "no such file",
    }
    (folder / "list.txt").write_bytes(
        b"\xef\xbb\xbf" + b"\r\n\n".join(os.fsencode(entry) for entry in entries)
    )
    found = find_inputs(folder / "list.txt")
    assert list(found) == list(entries)
    for (entry, expected), data in zip(
        entries.items(), read_inputs(list(found.values())), strict=True
    ):
        if isinstance(expected, bytes):
            assert data == expected, entry
        else:
            assert isinstance(data, str) and expected in data, (entry, data)


def test_a_list_elsewhere_names_no_file_of_this_machine(memory: Url, folder: Path) -> None:
    write(memory / "in/a.jpg", b"far")
    image = folder / "01.jpg"
    entries = ["a.jpg", f"{memory}/in/a.jpg", str(image), image.as_uri(), f"local://{image}"]
    entries.append("../../../.." + str(image))
    write(memory / "in/list.txt", "\n".join(entries).encode())
    read = read_inputs(list(find_inputs(memory / "in/list.txt").values()))
    assert read[:2] == [b"far", b"far"]
    assert [isinstance(each, str) for each in read] == [False] * 2 + [True] * 4, read


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("list.txt", "a.jpg\n\nb.jpg\r\na.jpg\n", "lines 1 and 4 of .*list.txt both name 'a.jpg'"),
        ("list.csv", "filename\na\nb\nb\n", "rows 2 and 3 of .*list.csv both name 'b'"),
        ("list.csv", "filename,x\na,1\n,2\n", "row 2 of .*list.csv names no image"),
        ("list.csv", "label\nx\n", "lacks the column filename"),
        ("list.txt", "\n \n", "list.txt names no images"),
        ("list.csv", "filename\n", "list.csv names no images"),
    ],
)
def test_a_list_that_cannot_be_used(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=said):
        find_inputs(tmp_path / name)


def test_two_rows_of_one_name(tmp_path: Path) -> None:
    columns = {"image": [b"1", b"2", b"3"], "path": ["a", "b", "a"]}
    parquet.write_table(pa.table(columns), tmp_path / "t.parquet")
    with pytest.raises(UserError, match=r"rows 0 and 2 of .*t.parquet both name 'a'"):
        find_inputs(tmp_path / "t.parquet")
    parquet.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "t.parquet")
    with pytest.raises(UserError, match=r"t.parquet has no rows"):
        find_inputs(tmp_path / "t.parquet")


def test_one_image(folder: Path, memory: Url, tmp_path: Path) -> None:
    write(memory / "00.jpg", IMAGES["01.jpg"])
    wanted = [{"filename": "01.jpg", "label": "size 5", "probability": "0.5", "error": ""}]
    assert score(folder / "01.jpg", tmp_path / "p.csv") == wanted
    assert score(memory / "00.jpg", tmp_path / "p.csv") == [wanted[0] | {"filename": "00.jpg"}]


def test_what_is_not_there(tmp_path: Path, memory: Url) -> None:
    with pytest.raises(UserError, match=r"no such folder: nowhere; --data also takes a list"):
        find_inputs(Path("nowhere"))
    for name in ("list.txt", "list.csv", "t.parquet"):
        for place in (tmp_path / name, memory / name):
            with pytest.raises(UserError, match=f"{name} cannot be read: "):
                find_inputs(place)
    # a folder may be called like a file
    (tmp_path / "list.csv").mkdir()
    (tmp_path / "list.csv" / "a.jpg").write_bytes(b"x")
    assert list(find_inputs(tmp_path / "list.csv")) == ["a.jpg"]


def test_a_package_that_a_list_needs_is_named_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "list.txt").write_text("a.jpg\nodd://x\ns3://bucket/a.jpg\n")
    monkeypatch.setattr(places.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="s3:// needs s3fs"):
        find_inputs(tmp_path / "list.txt")


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Images of at most ten bytes; yields how many bytes each read asked for."""
    monkeypatch.setattr(inputs, "TRAINING_LIMITS", type("Limits", (), {"bytes": 10}))
    asked: list[int] = []
    read_start = inputs.read_start

    def note(url: Url, most: int) -> bytes:
        asked.append(most)
        return read_start(url, most)

    monkeypatch.setattr(inputs, "read_start", note)
    yield asked


def test_a_huge_object_is_never_read(memory: Url, small_limit: list[int]) -> None:
    write(memory / "a.jpg", b"x" * 1_000_000)
    write(memory / "b.jpg", b"x" * 10)
    found = read_inputs(list(find_inputs(memory).values()))
    assert found == ["more than 10 bytes", b"x" * 10]
    assert small_limit == [11, 11]
