"""The file that stores the table of images: CSV, or Parquet for many rows.

Spreadsheets open CSV. A million rows of it take half a minute to write; Parquet takes two seconds.

A prepared folder, and a run's artifacts, may be somebody else's, and pyarrow trusts the file: what
it says in kilobytes may unpack to gigabytes. So only what `encode_table` writes is read: flat
columns without compression, which are never larger than the file (`har.data.parquet_footer`), and
texts as dictionaries, whose cells are counted before they are unpacked. pyarrow cannot read the
encodings that build a text from the one before it as dictionaries, and refuses them.
"""

import io
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from har.data.parquet_footer import check_footer
from har.util.escaping import format_csv, from_csv
from har.util.outputs import PARQUET_MARK

if TYPE_CHECKING:
    import pyarrow as pa

# The table has one row for each image.
COLUMNS = {
    "path": str,  # from the data folder, with forward slashes
    "label": str,  # the class name
    "label_id": int,  # in order of first appearance in the source's CSV
    "width": int,  # in pixels, as stored
    "height": int,
    "bytes": int,  # size of the file
    "plain_jpeg": bool,  # True if TensorFlow decodes it like Pillow (see har.data.images)
    "sha256": str,  # of the file's bytes, hexadecimal
    "perceptual_hash": str,  # hexadecimal; similar for look-alikes, empty for a plain picture
    "duplicate_group": int,  # copies of one image share it and stay on one side of a split
    "split": str,  # train, test or unused; the recipe takes validation images out of train
}
CSV_FILE, PARQUET_FILE = "manifest.csv", "manifest.parquet"
TABLE_FILES = (CSV_FILE, PARQUET_FILE)
# More are written as Parquet. So many have 25 MB in CSV.
MAX_CSV_ROWS = 100_000
# Larger files are not ours: 300 bytes a row.
MAX_TABLE_BYTES = 1_000_000_000
# The limits of a Parquet file. A million rows have 16 groups, and 11 kB of metadata.
MAX_ROWS = 5_000_000
MAX_GROUPS = 1000
MAX_FOOTER = 1_000_000
# All texts together; a path has at most 4,096 bytes.
MAX_TEXT_BYTES = 1_000_000_000
MAX_CELL = 5_000
ROWS_AT_ONCE = ROWS_PER_GROUP = 1 << 16


def encode_table(table: pd.DataFrame) -> tuple[str, bytes]:
    """Return the name of the file for a table with the COLUMNS, and its content."""
    if len(table) <= MAX_CSV_ROWS:
        return CSV_FILE, format_csv(table).encode()
    return PARQUET_FILE, _encode_parquet(table)


def decode_table(name: str, data: bytes, *, escaped: bool) -> pd.DataFrame:
    """Read a table from the content of its file; the cells of a CSV file may be `escaped`.

    Raises:
        ValueError: it is no such table.
    """
    if name == PARQUET_FILE:
        return decode_parquet(data)
    table = pd.read_csv(
        io.BytesIO(data),
        dtype=COLUMNS,  # type: ignore[arg-type]
        keep_default_na=False,  # "NA" may be a label or a file name
    )
    if escaped:
        table[["path", "label"]] = table[["path", "label"]].map(from_csv)
    return table[list(COLUMNS)]


def _encode_parquet(table: pd.DataFrame) -> bytes:
    import pyarrow as pa
    from pyarrow import parquet

    schema, out = _build_schema(), io.BytesIO()
    arrays = [pa.array(table[each.name], each.type) for each in schema]
    with parquet.ParquetWriter(
        out,
        schema,
        compression="none",
        use_dictionary=["label", "split"],
        write_statistics=False,
        store_schema=False,
    ) as writer:
        writer.write_table(pa.Table.from_arrays(arrays, schema=schema), ROWS_PER_GROUP)
        writer.add_key_value_metadata({"written_by": PARQUET_MARK})
    return out.getvalue()


def _build_schema(*, read: bool = False) -> "pa.Schema":
    """The types of the columns, as they are written or `read`; no cell can be missing."""
    # imported when it is needed: it takes a second where pandas does not use it
    import pyarrow as pa

    text = pa.dictionary(pa.int32(), pa.string()) if read else pa.string()
    types = {str: text, int: pa.int64(), bool: pa.bool_()}
    return pa.schema([pa.field(name, types[kind], False) for name, kind in COLUMNS.items()])


def decode_parquet(data: bytes, columns: Sequence[str] = tuple(COLUMNS)) -> pd.DataFrame:
    """Read columns of a Parquet file that `encode_table` wrote.

    Raises:
        ValueError: it is no such file.
    """
    import pyarrow as pa
    from pyarrow import parquet

    check_footer(data, MAX_FOOTER)
    try:
        file = parquet.ParquetFile(
            pa.BufferReader(data),
            read_dictionary=[name for name, kind in COLUMNS.items() if kind is str],
            thrift_string_size_limit=MAX_FOOTER,
            thrift_container_size_limit=MAX_FOOTER,
        )
        _check_file(file)
        batches = list(_read_batches(file, columns))
        kinds = {str: pa.large_string(), int: pa.int64(), bool: pa.bool_()}
        schema = pa.schema([(name, kinds[COLUMNS[name]]) for name in columns])
        return pa.Table.from_batches(batches, schema=schema).to_pandas()
    except KeyError as error:
        raise ValueError(f"other columns than a table of images has: {error}") from error
    # pyarrow's errors are of many types
    except (OSError, NotImplementedError, MemoryError) as error:
        raise ValueError(str(error)) from error


def _check_file(file: Any) -> None:
    """Raise a ValueError unless the file announces what `encode_table` writes."""
    found, facts = file.schema_arrow, file.metadata
    if not found.equals(_build_schema(read=True)):
        names = [f"{each.name} {each.type}" for each in found]
        raise ValueError(f"other columns than a table of images has: {', '.join(names)[:300]}")
    if facts.num_rows > MAX_ROWS or facts.num_row_groups > MAX_GROUPS:
        raise ValueError(f"more than {MAX_ROWS:,} rows or {MAX_GROUPS:,} groups of rows")


def _read_batches(file: Any, columns: Sequence[str]) -> "Iterator[pa.RecordBatch]":
    """Yield the rows with plain texts, after a check of their number and size."""
    import pyarrow as pa

    rows = size = 0
    for batch in _iterate(file, columns):
        # texts are UTF-8, and every cell is in its dictionary
        batch.validate(full=True)
        arrays = []
        for name in columns:
            array = batch.column(name)
            if COLUMNS[name] is str:
                size += _measure(array, name)
                if size > MAX_TEXT_BYTES:
                    raise ValueError(f"more than {MAX_TEXT_BYTES:,} bytes of text")
                # pandas' own type, which is not copied again
                array = array.dictionary_decode().cast(pa.large_string())
            arrays.append(array)
        rows += len(batch)
        if rows > MAX_ROWS:
            raise ValueError(f"more than {MAX_ROWS:,} rows")
        yield pa.RecordBatch.from_arrays(arrays, names=list(columns))


def _iterate(file: Any, columns: Sequence[str]) -> "Iterator[pa.RecordBatch]":
    # one group of rows at a time: over several, pyarrow's dictionaries would grow to all texts
    for group in range(file.metadata.num_row_groups):
        yield from file.iter_batches(
            batch_size=ROWS_AT_ONCE, row_groups=[group], columns=columns, use_threads=False
        )


def _measure(array: Any, name: str) -> int:
    """Return the bytes of all texts of a dictionary array; a ValueError if one is too long."""
    import numpy as np
    from pyarrow import compute

    lengths = compute.binary_length(array.dictionary).to_numpy(zero_copy_only=False)
    if len(lengths) and lengths.max() > MAX_CELL:
        raise ValueError(f"a {name} of more than {MAX_CELL:,} bytes")
    # each length in 64 bits: their sum may be more than 32 hold
    return int(lengths.astype(np.int64)[array.indices.to_numpy(zero_copy_only=False)].sum())
