"""Images in a Parquet table, found by its metadata and names, and read row by row.

The table may be anybody's. Its metadata is checked before pyarrow sees it
(`har.data.parquet_footer`). Rows come one at a time from a stream of the row group that has them:
memory holds the page under way, and what rows share in the file is copied for one of them.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from har.data.images import ImageError, check_bytes
from har.data.limits import TRAINING_LIMITS
from har.data.parquet_footer import Column, Footer, read_foreign_footer
from har.util.errors import UserError, first_line
from har.util.places import Place, open_place

IMAGE_COLUMNS = ("image", "content", "bytes")
NAME_COLUMNS = ("filename", "path")
# A thousand groups of rows of ten columns have a megabyte, with statistics three.
MAX_FOOTER = 10_000_000
MAX_ROWS = 5_000_000
# All names together; a path has at most 4,096 bytes.
MAX_TEXT_BYTES, MAX_NAME = 1_000_000_000, 5_000
NAMES_AT_ONCE = 1 << 16
BUFFER_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Row:
    """An image in a table: the row `at` of a group of rows, both from 0."""

    table: Place
    group: int
    at: int


class _Table:
    """An open table with one column of images, and perhaps one of names."""

    def __init__(self, place: Place) -> None:
        from pyarrow import parquet

        self._opened = ExitStack()
        stream = self._opened.enter_context(open_place(place))
        self.footer = read_foreign_footer(stream, MAX_FOOTER)
        image = _choose_column(self.footer, IMAGE_COLUMNS)
        if image is None:
            found = ", ".join(".".join(each.path) for each in self.footer.columns)[:200]
            expected = ", ".join(IMAGE_COLUMNS)
            raise ValueError(f"it has no column of bytes called {expected}, but {found}")
        self.image, self.name = image, _choose_column(self.footer, NAME_COLUMNS)
        self._file = parquet.ParquetFile(
            stream,
            read_dictionary=[self.name] if self.name else None,
            # else it reads all of a column in a group at once
            pre_buffer=False,
            buffer_size=BUFFER_BYTES,
            thrift_string_size_limit=MAX_FOOTER,
            thrift_container_size_limit=MAX_FOOTER,
        )
        self._check_types()

    def _check_types(self) -> None:
        from pyarrow import types

        kind = self._file.schema_arrow.field(self.image).type
        if not (types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)):
            raise ValueError(f"its column {self.image} must have bytes, not {kind}")

    def iterate(self, column: str, group: int, size: int) -> Iterator[Any]:
        """Yield a column of a group of rows, `size` values at a time."""
        for batch in self._file.iter_batches(
            batch_size=size, row_groups=[group], columns=[column], use_threads=False
        ):
            yield batch.column(0)


def _choose_column(footer: Footer, names: Sequence[str]) -> str | None:
    """Return the first of `names` that is one plain column of texts or bytes."""
    for name in names:
        found = [each for each in footer.columns if each.path[0] == name]
        if len(found) == 1 and _is_plain(found[0]):
            return name
    return None


def _is_plain(column: Column) -> bool:
    flat = len(column.path) == 1 and not column.repetition
    return flat and column.is_bytes


def find_rows(table: Place) -> tuple[list[str], list[Row]]:
    """Return the names and places of the images in a table. Without a column of names, an image has
    the number of its row, from 0.

    Raises:
        UserError: it is no table of images.
    """
    _open_reader.cache_clear()
    try:
        opened = _Table(table)
        counts = opened.footer.group_rows
        if sum(counts) > MAX_ROWS:
            raise ValueError(f"{sum(counts):,} rows, more than {MAX_ROWS:,}")
        rows = [Row(table, group, at) for group, n in enumerate(counts) for at in range(n)]
        names = list(_read_names(opened)) if opened.name else [str(n) for n in range(len(rows))]
        if len(names) != len(rows):
            raise ValueError(f"{len(names):,} names in {len(rows):,} rows")
    except UserError:
        raise
    # pyarrow's errors are of many types, and a store's packages have their own
    except Exception as error:
        raise UserError(f"{table} cannot be read: {first_line(error)}") from error
    return names, rows


def _read_names(table: _Table) -> Iterator[str]:
    from pyarrow import compute

    total = row = 0
    for group in range(len(table.footer.group_rows)):
        for texts in table.iterate(str(table.name), group, NAMES_AT_ONCE):
            # a dictionary: each text is there once, and measured before it is copied for its rows
            longest = compute.max(compute.binary_length(texts.dictionary)).as_py() or 0
            if longest > MAX_NAME:
                raise ValueError(f"a name of more than {MAX_NAME:,} bytes")
            for name in texts.to_pylist():
                if not name or not isinstance(name, str):
                    raise ValueError(f"row {row} has no name in its column {table.name}")
                yield name
                row += 1
                total += len(name)
            if total > MAX_TEXT_BYTES:
                raise ValueError(f"more than {MAX_TEXT_BYTES:,} letters of names")


class _Reader:
    """Reads the images of a table. Rows that come in their order are read from one stream."""

    def __init__(self, place: Place) -> None:
        self._table = _Table(place)
        self._group, self._next = -1, 0
        self._values: Iterator[Any] = iter(())
        # the first row of a group that cannot be read, and why
        self._broken: dict[int, tuple[int, str]] = {}

    def read(self, row: Row) -> bytes:
        at, why = self._broken.get(row.group, (0, ""))
        if why and row.at >= at:
            raise ImageError(why)
        try:
            if row.group != self._group or row.at < self._next:
                self._group, self._next = row.group, 0
                self._values = self._table.iterate(self._table.image, row.group, 1)
            while self._next <= row.at:
                value = next(self._values)
                self._next += 1
            return _check_value(value[0])
        except ImageError:
            raise
        # as in `find_rows`
        except Exception as error:
            why = "the table ends before" if isinstance(error, StopIteration) else first_line(error)
            self._broken[row.group] = (self._next, f"cannot be read: {why}")
            self._group = -1
            raise ImageError(self._broken[row.group][1]) from error


def _check_value(value: Any) -> bytes:
    if not value.is_valid:
        raise ImageError("no bytes: the cell is empty")
    size = value.as_buffer().size
    check_bytes(size, TRAINING_LIMITS.bytes)
    return bytes(value.as_py())


# the last table that a process reads stays open
@lru_cache(maxsize=1)
def _open_reader(table: Place) -> _Reader:
    return _Reader(table)


def read_row(row: Row) -> bytes:
    """Read an image; fast if rows are asked for in their order, by one thread.

    Raises:
        ImageError: it cannot be read, or has no bytes or too many.
    """
    try:
        reader = _open_reader(row.table)
    # as in `find_rows`
    except Exception as error:
        raise ImageError(f"cannot be read: {first_line(error)}") from error
    return reader.read(row)
