"""Tables of labels: what is read, and what is refused before it costs anything."""

import gzip
import os
import time
from pathlib import Path

import pytest

from har.data import tables
from har.data.tables import has_label_columns, read_table
from har.util.errors import UserError


def read(path: Path) -> list[list[str]]:
    return read_table(path, lambda name: True).rows.to_numpy().tolist()


def test_texts_stay_as_written(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text('filename,label\n"a,b.jpg",NA\nnull,"x\ny"\n c ,1.0\nshort\n')
    assert read(file) == [["a,b.jpg", "NA"], ["null", "x\ny"], [" c ", "1.0"], ["short", ""]]


def test_names_alone(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text("filename\na.jpg\n")
    assert read_table(file, lambda name: True, labelled=False).rows["filename"].tolist() == [
        "a.jpg"
    ]
    assert not has_label_columns(file)


def test_the_column_that_names_files_is_taken(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text("id,image,label\n1,a,x\n2,b,y\n")
    assert read_table(file, {"a", "b"}.__contains__).rows["filename"].tolist() == ["a", "b"]
    with pytest.raises(UserError, match=r"several filename columns: 'id' and 'image'; call one"):
        read_table(file, lambda name: False)


def bomb(file: Path) -> None:
    file.write_bytes(gzip.compress(bytes(50_000_000)))


HOSTILE = {
    "a device": (lambda file: file.symlink_to("/dev/zero"), "not a file"),
    "a pipe": (os.mkfifo, "not a file"),
    "a gzip bomb": (bomb, "more than 10,000,000 bytes when decompressed"),
    "too large": (lambda file: file.write_bytes(b"x" * 10_000_001), "more than 10,000,000 bytes"),
    "a cut archive": (lambda file: file.write_bytes(gzip.compress(b"a" * 999)[:-9]), "is cut"),
    "a damaged archive": (lambda file: file.write_bytes(b"\x1f\x8b\x08\0\0"), "cut"),
    "zero bytes": (lambda file: file.write_bytes(b"filename,label\n\0"), "no text"),
    "odd UTF-16": (lambda file: file.write_bytes(b"\xff\xfea\0b"), "is not utf-16"),
    "an endless cell": (lambda file: file.write_text("filename,label\n" + "a" * 200_000), "line 2"),
    "empty": (lambda file: file.write_text("\n\n"), "it is empty"),
    "a picture": (lambda file: file.write_bytes(b"\xff\xd8\xff\xe0"), "no table .* but a JPEG"),
}  # fmt: skip


@pytest.mark.parametrize(("write", "message"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_tables(
    tmp_path: Path, write, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "MAX_BYTES", 10_000_000)
    write(tmp_path / "t.csv")
    started = time.monotonic()
    with pytest.raises(UserError, match=message):
        read(tmp_path / "t.csv")
    has_label_columns(tmp_path / "t.csv")
    assert time.monotonic() - started < 2
