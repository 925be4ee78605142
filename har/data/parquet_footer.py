"""Checks the metadata at the end of a Parquet file before pyarrow sees it.

pyarrow ends the process for some metadata that it cannot read (25.0: a histogram of another length
than it expects). So what is not needed must not be there at all: in a table that this project
writes, compression and statistics; in one that others wrote, encryption and other files.
"""

from dataclasses import dataclass
from typing import IO, Any

MAGIC = b"PAR1"
MAX_DEPTH = 12
# Fields by their numbers in Parquet's own definition. Left out are encryption, statistics, indices
# and other files.
_FILE_FIELDS = {1, 2, 3, 4, 5, 6, 7}
_ROW_GROUPS, _COLUMNS, _COLUMN = 4, 1, 3
_GROUP_FIELDS = {1, 2, 3, 5, 6, 7}
_CHUNK_FIELDS = {2, 3}
_COLUMN_FIELDS = {1, 2, 3, 4, 5, 6, 7, 9, 11, 13, 16}
_CODEC, _UNCOMPRESSED, _SIZES = 4, 0, 16
# Of the sizes, which pyarrow always writes: bytes, and two histograms, empty for plain columns.
_SIZE_FIELDS, _HISTOGRAMS = {1, 2, 3}, (2, 3)
# Of a table that others wrote: with the places of indices, statistics and Bloom filters; with every
# codec but LZO, which pyarrow does not know.
_FOREIGN_CHUNK_FIELDS = {2, 3, 4, 5, 6, 7}
_FOREIGN_COLUMN_FIELDS = set(range(1, 17))
_FOREIGN_CODECS = {0, 1, 2, 4, 5, 6, 7}
_SCHEMA, _ROWS, _CHILDREN, _NAME, _KIND, _REPETITION = 2, 3, 5, 4, 1, 3
_OPTIONAL_OR_MORE, _REPEATED, _BYTE_ARRAY = (1, 2), 2, 6
# Of groups of columns. A schema of 100,000 levels ends the process.
MAX_SCHEMA_DEPTH = 30


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column that holds values: the names on the way to it, and how often on that way a value may
    be missing (`definition`) or be many (`repetition`).
    """

    path: tuple[str, ...]
    is_bytes: bool
    definition: int
    repetition: int


@dataclass(frozen=True, kw_only=True)
class Footer:
    """The columns of a file, and the number of rows in each of its groups."""

    columns: tuple[Column, ...]
    group_rows: tuple[int, ...]


def check_footer(data: bytes, limit: int) -> None:
    """Raise a ValueError unless a file's metadata has at most `limit` bytes, and says that nothing
    is compressed, encrypted or in another file.
    """
    if len(data) < 12 or data[:4] != MAGIC or data[-4:] != MAGIC:
        raise ValueError("not a Parquet file")
    if (size := int.from_bytes(data[-8:-4], "little")) > min(limit, len(data) - 12):
        raise ValueError(f"{size:,} bytes of metadata, more than {limit:,} or the file")
    try:
        _check_file(_Reader(data[-8 - size : -8]).read_struct(0))
    except (IndexError, KeyError, TypeError, AttributeError) as error:
        raise ValueError("its metadata cannot be read") from error


def check_histograms(data: bytes, column: int, max_definition: int) -> None:
    """Raise a ValueError unless the histograms of a flat column, given by its number in the schema,
    have the lengths that pyarrow expects.

    `max_definition` is 1 for a column that may have nulls, else 0.
    """
    size = int.from_bytes(data[-8:-4], "little")
    try:
        file = _Reader(data[-8 - size : -8]).read_struct(0)
        for group in file[_ROW_GROUPS]:
            sizes = group[_COLUMNS][column][_COLUMN].get(_SIZES, {})
            for number, length in zip(_HISTOGRAMS, (1, max_definition + 1), strict=True):
                if len(sizes.get(number, [])) not in (0, length):
                    raise ValueError("its metadata has a histogram of another length")
    except (IndexError, KeyError, TypeError, AttributeError) as error:
        raise ValueError("its metadata cannot be read") from error


def read_foreign_footer(file: IO[bytes], limit: int) -> Footer:
    """Read the metadata, of at most `limit` bytes, at the end of a file that others wrote.

    Raises:
        ValueError: pyarrow must not see it, or it is no Parquet file.
    """
    file_size = file.seek(0, 2)
    file.seek(max(0, file_size - 8))
    end = file.read(8)
    if file_size < 12 or end[4:] != MAGIC:
        raise ValueError("not a Parquet file, or an encrypted one")
    if (size := int.from_bytes(end[:4], "little")) > min(limit, file_size - 12):
        raise ValueError(f"{size:,} bytes of metadata, more than {limit:,} or the file")
    file.seek(file_size - 8 - size)
    try:
        return _check_foreign(_Reader(file.read(size)).read_struct(0))
    except (IndexError, KeyError, TypeError, AttributeError) as error:
        raise ValueError("its metadata cannot be read") from error


def _check_foreign(file: dict[int, Any]) -> Footer:
    _check_fields(file, _FILE_FIELDS)
    columns = _find_columns(file[_SCHEMA])
    rows = []
    for group in file[_ROW_GROUPS]:
        _check_fields(group, _GROUP_FIELDS)
        for column, chunk in zip(columns, group[_COLUMNS], strict=True):
            _check_fields(chunk, _FOREIGN_CHUNK_FIELDS)
            _check_foreign_column(chunk[_COLUMN], column)
        rows.append(int(group[_ROWS]))
    if min(rows, default=0) < 0 or sum(rows) != file[_ROWS]:
        raise ValueError("its metadata counts other rows than its groups have")
    return Footer(columns=tuple(columns), group_rows=tuple(rows))


def _check_foreign_column(found: dict[int, Any], column: Column) -> None:
    _check_fields(found, _FOREIGN_COLUMN_FIELDS)
    if found[_CODEC] not in _FOREIGN_CODECS:
        raise ValueError(f"it is compressed in an unknown way (codec {found[_CODEC]})")
    sizes = found.get(_SIZES, {})
    _check_fields(sizes, _SIZE_FIELDS)
    lengths = column.repetition + 1, column.definition + 1
    for number, length in zip(_HISTOGRAMS, lengths, strict=True):
        if len(sizes.get(number, [])) not in (0, length):
            raise ValueError("its metadata has a histogram of another length")


def _find_columns(schema: list[dict[int, Any]]) -> list[Column]:
    """Find the columns in a schema: a list in which each group stands before what it holds."""
    columns = []
    # groups that are not complete: how many members are missing, and what a Column has
    groups: list[list[Any]] = [[schema[0].get(_CHILDREN, 0), (), 0, 0]]
    for element in schema[1:]:
        while groups and not groups[-1][0]:
            groups.pop()
        # an IndexError if no group misses a member
        groups[-1][0] -= 1
        _, path, definition, repetition = groups[-1]
        path = (*path, element[_NAME].decode("utf-8", "replace"))
        definition += element.get(_REPETITION, 0) in _OPTIONAL_OR_MORE
        repetition += element.get(_REPETITION, 0) == _REPEATED
        if children := element.get(_CHILDREN, 0):
            groups.append([children, path, definition, repetition])
        else:
            columns.append(
                Column(
                    path=path,
                    is_bytes=element.get(_KIND) == _BYTE_ARRAY,
                    definition=definition,
                    repetition=repetition,
                )
            )
        if len(groups) > MAX_SCHEMA_DEPTH:
            raise ValueError("its columns lie too deep in others")
    if any(missing for missing, *_ in groups):
        raise ValueError("its metadata cannot be read")
    return columns


def _check_file(file: dict[int, Any]) -> None:
    _check_fields(file, _FILE_FIELDS)
    for group in file[_ROW_GROUPS]:
        _check_fields(group, _GROUP_FIELDS)
        for chunk in group[_COLUMNS]:
            _check_fields(chunk, _CHUNK_FIELDS)
            column = chunk[_COLUMN]
            if column[_CODEC] != _UNCOMPRESSED:
                raise ValueError(f"it is compressed (codec {column[_CODEC]})")
            _check_fields(column, _COLUMN_FIELDS)
            sizes = column.get(_SIZES, {})
            _check_fields(sizes, _SIZE_FIELDS)
            if any(sizes.get(each) for each in _HISTOGRAMS):
                raise ValueError("its metadata has histograms, which a table has not")


def _check_fields(found: dict[int, Any], allowed: set[int]) -> None:
    if more := found.keys() - allowed:
        raise ValueError(f"its metadata has more than a table needs (field {min(more)})")


class _Reader:
    """Reads Thrift's compact protocol, in which the metadata is written."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def read_struct(self, depth: int) -> dict[int, Any]:
        """Return the fields by their numbers, which must grow: of two equal ones, which counts?"""
        found: dict[int, Any] = {}
        number = 0
        while header := self._byte():
            step, kind = header >> 4, header & 15
            if not step:
                raise ValueError("its metadata has fields out of order")
            number += step
            # a flag is its own value
            found[number] = kind == 1 if kind in (1, 2) else self._read(kind, depth + 1)
        return found

    def _read(self, kind: int, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise ValueError("its metadata is too deep")
        if kind in (4, 5, 6):
            value = self._varint()
            return value >> 1 ^ -(value & 1)
        if kind == 8:
            return self._bytes(self._varint())
        if kind == 9:
            return self._list(depth)
        if kind == 12:
            return self.read_struct(depth)
        if kind in (1, 2, 3):
            return self._byte()
        if kind == 7:
            return self._bytes(8)
        raise ValueError(f"its metadata has a value of kind {kind}")

    def _list(self, depth: int) -> list[Any]:
        header = self._byte()
        size = header >> 4
        size = self._varint() if size == 15 else size
        # each element has a byte at least: a size that is too large ends as an IndexError
        return [self._read(header & 15, depth + 1) for _ in range(size)]

    def _byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def _bytes(self, size: int) -> bytes:
        self.at += size
        if self.at > len(self.data):
            raise IndexError("beyond the end")
        return self.data[self.at - size : self.at]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise ValueError("its metadata has a number of more than 64 bits")
