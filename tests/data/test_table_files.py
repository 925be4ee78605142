"""A table of images survives either file; a hostile Parquet file is refused without much memory."""

import io
import resource
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import parquet

from har.data import table_files
from har.data.manifest import Manifest
from har.data.table_files import (
    COLUMNS,
    CSV_FILE,
    PARQUET_FILE,
    decode_parquet,
    decode_table,
    encode_table,
)
from har.util.outputs import MARK_BYTES, PARQUET_MARK

NAMES = ["NA", "a,b", 'q"uote', "new\nline", "=1+1", "'quoted", "Übung 1", "", "\r"]


@pytest.fixture
def table(manifest: Manifest) -> pd.DataFrame:
    table = manifest.table.copy()
    table.loc[: len(NAMES) - 1, "path"] = NAMES
    table.loc[0, "bytes"] = 2**40
    return table


@pytest.fixture
def parquet_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_files, "MAX_CSV_ROWS", 0)


def test_few_rows_are_csv_and_many_parquet(
    table: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_files, "MAX_CSV_ROWS", len(table))
    assert encode_table(table)[0] == CSV_FILE
    monkeypatch.setattr(table_files, "MAX_CSV_ROWS", len(table) - 1)
    assert encode_table(table)[0] == PARQUET_FILE


@pytest.mark.parametrize("most", [0, 1000])
def test_read_equals_written(
    most: int, table: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_files, "MAX_CSV_ROWS", most)
    # several groups of rows, and several reads of each
    monkeypatch.setattr(table_files, "ROWS_PER_GROUP", 10)
    monkeypatch.setattr(table_files, "ROWS_AT_ONCE", 4)
    name, data = encode_table(table)
    found = decode_table(name, data, escaped=True)
    pd.testing.assert_frame_equal(found, table)
    assert found.equals(table)


@pytest.mark.usefixtures("parquet_always")
def test_columns_are_read_alone_and_other_programs_read_the_file(table: pd.DataFrame) -> None:
    name, data = encode_table(table)
    assert name == PARQUET_FILE and PARQUET_MARK.encode() in data[-MARK_BYTES:]
    found = decode_parquet(data, ["split", "sha256"])
    pd.testing.assert_frame_equal(found, table[["split", "sha256"]])
    pd.testing.assert_frame_equal(pd.read_parquet(io.BytesIO(data)), table, check_dtype=False)


@pytest.mark.usefixtures("parquet_always")
def test_no_rows(table: pd.DataFrame) -> None:
    assert encode_table(table[:0])[0] == CSV_FILE
    found = decode_parquet(table_files._encode_parquet(table[:0]))
    assert list(found) == list(COLUMNS) and found.empty


def write(rows: int = 4, *, schema: pa.Schema | None = None, **changes: Any) -> bytes:
    """A table of so many equal rows; `changes` are options of the writer, or other columns."""
    schema = schema or table_files._build_schema()
    kinds = {pa.string(): "x", pa.int64(): 1, pa.bool_(): True}
    columns = {
        each.name: changes.pop(each.name, None) or pa.array([kinds[each.type]] * rows, each.type)
        for each in schema
    }
    out = io.BytesIO()
    options: dict[str, Any] = {
        "compression": "none",
        "store_schema": False,
        "write_statistics": False,
        **changes,
    }
    arrow = pa.Table.from_arrays([pa.array(each) for each in columns.values()], schema=schema)
    parquet.write_table(arrow, out, **options)
    return out.getvalue()


def reschema(name: str, field: pa.Field | None) -> pa.Schema:
    """The schema with another field in the place of one, or without it."""
    schema = table_files._build_schema()
    at = schema.get_field_index(name)
    return schema.set(at, field) if field else schema.remove(at)


def write_repeated(name: str, text: str, rows: int) -> bytes:
    """A file with a text once, which so many cells of a column are."""
    found = pa.DictionaryArray.from_arrays(np.zeros(rows, np.int32), pa.array([text]))
    return write(rows, schema=reschema(name, pa.field(name, found.type, False)), **{name: found})


def lie_about_the_footer() -> bytes:
    data = write()
    return data[:-8] + (10**9).to_bytes(4, "little") + data[-4:]


HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "not a Parquet file"),
    "CSV": (lambda: b"path,label,label_id,width", "not a Parquet file"),
    "a mark and no more": (lambda: b"PAR1" * 3, "metadata"),
    "an endless footer": (lie_about_the_footer, "bytes of metadata"),
    "a column less": (lambda: write(schema=reschema("split", None)), "other columns"),
    "a column more": (
        lambda: write(schema=table_files._build_schema().append(pa.field("x", pa.int64(), False))),
        "other columns",
    ),
    "numbers as labels": (
        lambda: write(schema=reschema("label", pa.field("label", pa.int64(), False))),
        "other columns",
    ),
    "bytes as labels": (
        lambda: write(
            schema=reschema("label", pa.field("label", pa.binary(), False)),
            label=pa.array([b"\xff"] * 4),
        ),
        "other columns",
    ),
    "lists of labels": (
        lambda: write(
            schema=reschema("label", pa.field("label", pa.list_(pa.string()), False)),
            label=pa.array([["a"]] * 4),
        ),
        "other columns|histograms",
    ),
    "missing labels": (
        lambda: write(
            schema=reschema("label", pa.field("label", pa.string())),
            label=pa.array(["a", None] * 2),
        ),
        "other columns|histograms",
    ),
    "a small file of many zeros": (
        lambda: write(compression="zstd", path=pa.array(["0" * 5000] * 4)),
        "compressed",
    ),
    "snappy": (lambda: write(compression="snappy"), "compressed"),
    "one long text": (lambda: write(path=pa.array(["x" * 5001] * 4)), "a path of more than 5,000"),
    "a long text in a dictionary": (
        lambda: write_repeated("path", "x" * 10**6, 20_000),
        "a path of more than 5,000",
    ),
    "a small file of many texts": (
        lambda: write_repeated("path", "x" * 5000, 400_000),
        "bytes of text",
    ),
    "lengths that are differences": (
        lambda: write(use_dictionary=False, column_encoding={"path": "DELTA_LENGTH_BYTE_ARRAY"}),
        "DeltaLengthByteArray",
    ),
    "texts that begin like the one before": (
        lambda: write(
            path=pa.array(["x" * 10**6] * 20),
            rows=20,
            use_dictionary=False,
            column_encoding={"path": "DELTA_BYTE_ARRAY"},
        ),
        "DeltaByteArray",
    ),
    "too many rows": (lambda: write(rows=5_000_001, use_dictionary=True), "rows"),
    "too many groups": (lambda: write(rows=1001, row_group_size=1), "groups"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_files, "MAX_TEXT_BYTES", 100_000_000)
    build, said = HOSTILE[name]
    data = build()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=said):
        decode_parquet(data)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB


def test_a_damaged_file_is_refused_or_another_table(table: pd.DataFrame) -> None:
    data = table_files._encode_parquet(table)
    rng = np.random.default_rng(0)
    refused = 0
    # half of the bytes are of the metadata
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    places = [rng.integers(start, len(data), 1000) for start in (0, footer)]
    for at in np.concatenate(places):
        damaged = bytearray(data)
        damaged[at] ^= int(rng.integers(1, 256))
        try:
            assert list(decode_parquet(bytes(damaged))) == list(COLUMNS)
        except ValueError:
            refused += 1
    assert 0 < refused < 2000
