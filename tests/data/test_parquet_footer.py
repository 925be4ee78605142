"""Metadata that would end the process, or hide something, is refused before pyarrow reads it."""

import io
from collections.abc import Callable

import pyarrow as pa
import pytest
from pyarrow import parquet

from har.data import table_files
from har.data.manifest import Manifest
from har.data.parquet_footer import MAGIC, Footer, check_footer, read_foreign_footer

Fields = dict[int, bytes]
LIMIT = 1_000_000


def number(value: int) -> bytes:
    """An integer, as its kind and its digits in Thrift's compact protocol."""
    return b"\x05" + varint((value << 1) ^ (value >> 63))


def varint(value: int) -> bytes:
    digits = []
    while value > 127:
        digits.append(value & 127 | 128)
        value >>= 7
    return bytes([*digits, value])


def text(value: bytes) -> bytes:
    return b"\x08" + varint(len(value)) + value


def a_list(*items: bytes, kind: int = 12) -> bytes:
    assert len(items) < 15
    return bytes([9, len(items) << 4 | kind]) + b"".join(item[1:] for item in items)


def struct(fields: Fields) -> bytes:
    found, before = b"\x0c", 0
    for at in sorted(fields):
        found += bytes([(at - before) << 4 | fields[at][0]]) + fields[at][1:]
        before = at
    return found + b"\x00"


def file(footer: bytes) -> bytes:
    return MAGIC + footer + len(footer).to_bytes(4, "little") + MAGIC


def build(**more: Fields) -> bytes:
    """A file of one column, with other or additional fields of `column`, `chunk` or `whole`."""
    fields = {"column": {1: number(6), 4: number(0)}, "chunk": {}, "whole": {}}
    column, chunk, whole = (fields[name] | more.get(name, {}) for name in fields)
    groups = struct({1: a_list(struct({3: struct(column), **chunk})), 3: number(1)})
    return file(struct({1: number(2), 3: number(1), 4: a_list(groups), **whole})[1:])


def nested(depth: int) -> bytes:
    """A file of structs, each the first field of the one around it."""
    return file(b"\x1c" * depth + b"\x00" * (depth + 1))


HISTOGRAM = a_list(number(1), number(2), kind=6)
REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "a histogram of another length": (
        lambda: build(column={16: struct({1: number(9), 2: HISTOGRAM})}), "histograms"
    ),
    "statistics": (lambda: build(column={12: struct({})}), "field 12"),
    "another file": (lambda: build(chunk={1: text(b"/etc/passwd")}), "field 1"),
    "encrypted": (lambda: build(whole={8: struct({})}), "field 8"),
    "an encrypted column": (lambda: build(chunk={8: struct({})}), "field 8"),
    "compressed": (lambda: build(column={4: number(6)}), "compressed"),
    "a codec of text": (lambda: build(column={4: text(b"0")}), "compressed"),
    "no groups": (lambda: file(b"\x15\x04\x00"), "cannot be read"),
    "groups of numbers": (lambda: build(whole={4: a_list(number(1), kind=5)}), "cannot be read"),
    "a field twice": (lambda: file(b"\x15\x04\x05\x02\x04\x00"), "out of order"),
    "deep": (lambda: nested(400_000), "too deep"),
    "a list without its elements": (
        lambda: file(b"\x19\xf5" + varint(2**40) + b"\x00"), "cannot be read"
    ),
    "a text without its letters": (lambda: file(b"\x18" + varint(2**40)), "cannot be read"),
    "an endless number": (lambda: file(b"\x15" + b"\xff" * 1000), "64 bits"),
    "a value of no kind": (lambda: file(b"\x1e\x00"), "kind 14"),
    "more than the file": (lambda: MAGIC + (100).to_bytes(4, "little") + MAGIC, "metadata"),
}  # fmt: skip


def test_what_a_table_needs_passes(manifest: Manifest) -> None:
    check_footer(build(), LIMIT)
    check_footer(build(column={16: struct({1: number(9), 2: a_list(kind=6)})}), LIMIT)
    check_footer(table_files._encode_parquet(manifest.table), LIMIT)


@pytest.mark.parametrize("name", REFUSED)
def test_anything_else_is_refused(name: str) -> None:
    make, said = REFUSED[name]
    with pytest.raises(ValueError, match=said):
        check_footer(make(), LIMIT)


def test_a_large_footer_is_refused_by_its_size() -> None:
    with pytest.raises(ValueError, match=r"bytes of metadata, more than 10 "):
        check_footer(build(), 10)


def read_foreign(data: bytes) -> Footer:
    return read_foreign_footer(io.BytesIO(data), LIMIT)


def schema(*elements: Fields) -> dict[int, bytes]:
    return {2: a_list(*(struct(each) for each in elements))}


ROOT = {4: text(b"schema"), 5: number(1)}
LEAF = {1: number(6), 3: number(1), 4: text(b"image")}


def foreign(**more: Fields) -> bytes:
    """A file of others: one column that may have nulls, with what pyarrow writes by default."""
    sizes = struct({2: a_list(number(3), kind=6), 3: a_list(number(1), number(2), kind=6)})
    column = {4: number(1), 12: struct({}), 16: sizes} | more.get("column", {})
    return build(
        column=column, chunk=more.get("chunk", {}), whole=schema(ROOT, LEAF) | more.get("whole", {})
    )


@pytest.mark.parametrize("codec", ["none", "snappy", "gzip", "brotli", "lz4", "zstd"])
def test_what_others_write_passes(codec: str) -> None:
    table = pa.table(
        {
            "image": [b"a" * 300, None, b"b"],
            "filename": ["x", "y", "z"],
            "boxes": [[1, 2], [], None],
            "info": [{"a": {"b": [1]}}, None, {"a": None}],
            "time": pa.array([1, 2, 3], pa.timestamp("us", "UTC")),
        }
    )
    buffer = io.BytesIO()
    parquet.write_table(
        table, buffer, compression=codec, row_group_size=2, write_page_index=True,
        write_page_checksum=True, bloom_filter_options={"filename": True},
    )  # fmt: skip
    found = read_foreign(buffer.getvalue())
    assert found.group_rows == (2, 1)
    levels = {".".join(each.path): (each.definition, each.repetition) for each in found.columns}
    assert levels == {
        "image": (1, 0), "filename": (1, 0), "boxes.list.element": (3, 1),
        "info.a.b.list.element": (5, 1), "time": (1, 0),
    }  # fmt: skip
    # what pyarrow finds
    theirs = parquet.ParquetFile(buffer).schema
    for number_, each in enumerate(found.columns):
        column = theirs.column(number_)
        assert column.path == ".".join(each.path)
        assert (column.max_definition_level, column.max_repetition_level) == (
            each.definition, each.repetition,
        )  # fmt: skip
        assert (column.physical_type == "BYTE_ARRAY") == each.is_bytes
    assert read_foreign(foreign()).group_rows == (1,)


FOREIGN_REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "a histogram that is too long": (
        lambda: foreign(column={16: struct({3: a_list(*[number(1)] * 3, kind=6)})}),
        "histogram of another length",
    ),
    "one of repetitions": (
        lambda: foreign(column={16: struct({2: a_list(*[number(1)] * 2, kind=6)})}),
        "histogram of another length",
    ),
    "another file": (lambda: foreign(chunk={1: text(b"/etc/passwd")}), "field 1"),
    "encrypted": (lambda: foreign(whole={8: struct({})}), "field 8"),
    "an encrypted column": (lambda: foreign(chunk={8: struct({})}), "field 8"),
    "an encrypted footer": (lambda: foreign()[:-4] + b"PARE", "encrypted"),
    "an unknown codec": (lambda: foreign(column={4: number(3)}), "codec 3"),
    "a column too few": (
        lambda: foreign(whole=schema({**ROOT, 5: number(2)}, LEAF, LEAF)), "shorter"
    ),
    "a member too few": (lambda: foreign(whole=schema({**ROOT, 5: number(2)}, LEAF)), "read"),
    "a member too many": (lambda: foreign(whole=schema(ROOT, LEAF, LEAF)), "cannot be read"),
    "members below zero": (lambda: foreign(whole=schema({**ROOT, 5: number(-1)}, LEAF)), "read"),
    "a name of numbers": (lambda: foreign(whole=schema(ROOT, {**LEAF, 4: number(1)})), "read"),
    "other rows": (lambda: foreign(whole={3: number(7)}), "other rows"),
    "rows below zero": (lambda: foreign(whole={3: number(-1)}), "other rows"),
    "deep": (lambda: nested(400_000), "too deep"),
    "a deep schema": (lambda: deep(100), "too deep in others"),
    "more than the file": (lambda: MAGIC + (100).to_bytes(4, "little") + MAGIC, "metadata"),
    "nothing": (lambda: b"", "not a Parquet file"),
}  # fmt: skip


def deep(levels: int) -> bytes:
    """A column in groups in groups."""
    elements = [ROOT] * levels + [LEAF]
    items = b"".join(struct(each)[1:] for each in elements)
    return foreign(whole={2: b"\x09\xfc" + varint(len(elements)) + items})


@pytest.mark.parametrize("name", FOREIGN_REFUSED)
def test_of_others_too_some_is_refused(name: str) -> None:
    make, said = FOREIGN_REFUSED[name]
    with pytest.raises(ValueError, match=said):
        read_foreign(make())


def test_a_large_footer_of_others_is_not_even_read() -> None:
    with pytest.raises(ValueError, match=r"bytes of metadata, more than 10 "):
        read_foreign_footer(io.BytesIO(foreign()), 10)
