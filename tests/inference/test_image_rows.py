"""Images in a Parquet table: read once and in order, whatever the table is."""

import io
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from har.data.images import ImageError
from har.inference import image_rows
from har.inference.image_rows import Row, find_rows, read_row
from har.util.errors import UserError

IMAGES = [bytes([n]) * (n + 1) for n in range(25)]
NAMES = [f"{n}.jpg" for n in range(25)]


def write(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    parquet.write_table(pa.table(columns), path, **options)
    return path


@pytest.mark.parametrize("codec", ["none", "snappy", "gzip", "zstd", "lz4", "brotli"])
@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_rows_are_found_and_read(tmp_path: Path, codec: str, kind: Any) -> None:
    columns = {"label": NAMES, "image": pa.array(IMAGES, kind), "filename": NAMES}
    table = write(tmp_path / "t.parquet", columns, compression=codec, row_group_size=10)
    names, rows = find_rows(table)
    assert names == NAMES
    assert rows[0] == Row(table, 0, 0) and rows[24] == Row(table, 2, 4)
    assert [read_row(each) for each in rows] == IMAGES
    # in any other order too
    assert [read_row(rows[n]) for n in (7, 3, 3, 24, 0)] == [IMAGES[n] for n in (7, 3, 3, 24, 0)]


@pytest.mark.parametrize("image", ["image", "content", "bytes"])
def test_columns_by_their_usual_names(tmp_path: Path, image: str) -> None:
    named = write(tmp_path / "a.parquet", {"path": ["x", "y"], image: [b"1", b"2"], "z": [[1], []]})
    assert find_rows(named)[0] == ["x", "y"]
    without = write(tmp_path / "b.parquet", {image: [b"1", b"2"], "filename": [7, 8]})
    names, rows = find_rows(without)
    assert names == ["0", "1"] and read_row(rows[1]) == b"2"
    assert find_rows(write(tmp_path / "c.parquet", {image: pa.array([], pa.binary())})) == ([], [])


def test_rows_in_order_are_read_from_one_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = write(tmp_path / "t.parquet", {"image": IMAGES}, row_group_size=10)
    begun: list[int] = []
    iterate = image_rows._Table.iterate

    def count(self: Any, column: str, group: int, size: int) -> Any:
        begun.append(group)
        return iterate(self, column, group, size)

    monkeypatch.setattr(image_rows._Table, "iterate", count)
    _, rows = find_rows(table)
    assert [read_row(each) for each in rows[5:]] == IMAGES[5:]
    assert begun == [0, 1, 2]


def test_a_table_is_read_as_a_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One group of rows, as pandas writes it: it need not fit the memory."""
    cells = [bytes([n]) * 100_000 for n in range(200)]
    table = write(
        tmp_path / "t.parquet", {"image": cells}, compression="none", use_dictionary=False,
        write_batch_size=1,
    )  # fmt: skip
    most = 0

    @contextmanager
    def watch(place: Path) -> Iterator[Any]:
        class Watched(io.FileIO):
            def read(self, size: int = -1) -> bytes:
                nonlocal most
                # the metadata, at the end, apart
                if self.tell() < 15_000_000:
                    most = max(most, self.tell() + size)
                return super().read(size)

        with Watched(place) as file:
            yield file

    monkeypatch.setattr(image_rows, "open_place", watch)
    _, rows = find_rows(table)
    assert read_row(rows[0]) == cells[0] and 0 < most < 5_000_000
    assert read_row(rows[199]) == cells[199]


def test_errors_of_a_store_are_those_of_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As aiohttp's, which are of no usual kind."""

    class PayloadError(Exception):
        pass

    table = write(tmp_path / "t.parquet", {"image": IMAGES}, row_group_size=10)
    _, rows = find_rows(table)
    assert read_row(rows[3]) == IMAGES[3]

    def fail(*_: Any) -> Any:
        raise PayloadError("connection lost")

    with monkeypatch.context() as patch:
        patch.setattr(image_rows._Table, "iterate", fail)
        with pytest.raises(ImageError, match="cannot be read: connection lost"):
            read_row(rows[12])
        patch.setattr(image_rows, "open_place", fail)
        with pytest.raises(UserError, match=r"t.parquet cannot be read: connection lost"):
            find_rows(table)


def test_a_cell_without_an_image_is_an_error_of_its_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_rows, "TRAINING_LIMITS", type("Limits", (), {"bytes": 100}))
    cells = [b"a", None, b"", b"x" * 101, b"b" * 100]
    _, rows = find_rows(write(tmp_path / "t.parquet", {"image": cells}))
    found = []
    for each in rows:
        try:
            found.append(read_row(each).decode())
        except ImageError as error:
            found.append(str(error))
    assert found == [
        "a", "no bytes: the cell is empty", "empty: 0 bytes", "101 bytes, more than 100", "b" * 100,
    ]  # fmt: skip


def test_damage_is_an_error_of_the_rows_behind_it(tmp_path: Path) -> None:
    table = write(
        tmp_path / "t.parquet", {"image": IMAGES}, row_group_size=10, compression="zstd",
        use_dictionary=False, data_page_size=1, write_batch_size=5,
    )  # fmt: skip
    offset = parquet.ParquetFile(table).metadata.row_group(1).column(0).data_page_offset
    data = bytearray(table.read_bytes())
    # the second page of five rows
    page = bytes(data).find(b"\x28\xb5\x2f\xfd", bytes(data).find(b"\x28\xb5\x2f\xfd", offset) + 1)
    data[page : page + 4] = b"\0\0\0\0"
    table.write_bytes(data)
    _, rows = find_rows(table)
    errors = []
    for number, each in enumerate(rows):
        try:
            assert read_row(each) == IMAGES[number]
        except ImageError as error:
            assert "cannot be read" in str(error)
            errors.append(number)
    assert errors == [15, 16, 17, 18, 19]
    table.unlink()
    image_rows._open_reader.cache_clear()
    with pytest.raises(ImageError, match=r"cannot be read: .*No such file"):
        read_row(rows[0])


def test_one_value_for_all_rows_is_copied_for_one(tmp_path: Path) -> None:
    """A few kilobytes that would be 40 GB."""
    value = b"\0" * 40_000_000
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 1000, pa.int32()), pa.array([value]))
    options = {"compression": "zstd", "store_schema": False}
    table = write(tmp_path / "t.parquet", {"image": column}, **options)
    assert table.stat().st_size < 100_000
    _, rows = find_rows(table)
    assert [len(read_row(each)) for each in rows[:3]] == [len(value)] * 3


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"picture": [b"a"]}, "no column of bytes called image, content, bytes, but picture"),
        ({"image": [[b"a"]]}, "no column of bytes called image"),
        ({"image": [1]}, "no column of bytes called image"),
        ({"image": ["text"]}, "its column image must have bytes, not string"),
        (
            {"image": [b"a"], "path": pa.array([None], pa.string())},
            "row 0 has no name in its column path",
        ),
        ({"image": [b"a", b"b"], "path": ["a", ""]}, "row 1 has no name"),
        ({"image": [b"a"], "path": ["x" * 5001]}, "a name of more than 5,000 bytes"),
    ],
)
def test_other_tables_are_refused(tmp_path: Path, columns: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"t.parquet cannot be read: .*{said}"):
        find_rows(write(tmp_path / "t.parquet", columns))


def test_files_that_are_no_tables(tmp_path: Path) -> None:
    (tmp_path / "t.parquet").write_bytes(b"PAR1 junk and more of it")
    with pytest.raises(UserError, match="not a Parquet file"):
        find_rows(tmp_path / "t.parquet")
    with pytest.raises(UserError, match="No such file"):
        find_rows(tmp_path / "gone.parquet")
    with pytest.raises(UserError, match="cannot be read"):
        find_rows(tmp_path)


# It runs apart, for pyarrow may end its process.
FUZZ = """
import sys
from pathlib import Path
from har.data.images import ImageError
from har.inference.image_rows import find_rows, read_row
from har.util.errors import UserError

file, deep = map(Path, sys.argv[1:])
try:
    find_rows(deep)
except UserError as error:
    print(str(error).rpartition(": ")[2])
data = file.read_bytes()
start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
for place in range(start, len(data)):
    for value in (0, 3, 255, data[place] ^ 1, data[place] ^ 128):
        file.write_bytes(data[:place] + bytes([value]) + data[place + 1 :])
        try:
            _, rows = find_rows(file)
        except UserError:
            continue
        for row in rows[:3]:
            try:
                read_row(row)
            except ImageError:
                pass
print("done")
"""


def build_deep(levels: int) -> bytes:
    """A file whose column lies in groups in groups, in the words of Thrift."""
    group, leaf = b"\x35\x02\x18\x01s\x15\x02\0", b"\x15\x0c\x25\x02\x18\x05image\0"
    count = bytes([levels + 1 & 127 | 128, levels + 1 >> 7 & 127 | 128, levels + 1 >> 14])
    footer = b"\x15\x04\x19\xfc" + count + group * levels + leaf + b"\x16\0\x19\x0c\0"
    return b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1"


def test_no_metadata_end_the_process(tmp_path: Path) -> None:
    """Neither damage nor a schema of 100,000 levels, at which pyarrow does."""
    file, deep = tmp_path / "t.parquet", tmp_path / "deep.parquet"
    schema = pa.schema([pa.field("image", pa.binary()), pa.field("path", pa.string(), False)])
    parquet.write_table(
        pa.table({"image": [b"one", b"two"], "path": ["a", "b"]}, schema), file, store_schema=False
    )
    deep.write_bytes(build_deep(100_000))
    command = [sys.executable, "-c", FUZZ, str(file), str(deep)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = "its columns lie too deep in others\ndone\n"
    assert (done.returncode, done.stdout) == (0, said), done.stderr[-2000:]
