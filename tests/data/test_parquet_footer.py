"""Metadata that would end the process, or hide something, is refused before pyarrow reads it."""

from collections.abc import Callable

import pytest

from har.data import table_files
from har.data.manifest import Manifest
from har.data.parquet_footer import MAGIC, check_footer

Fields = dict[int, bytes]
LIMIT = 1_000_000


def number(value: int) -> bytes:
    """An integer, as its kind and its digits in Thrift's compact protocol."""
    return b"\x05" + varint(value << 1)


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
