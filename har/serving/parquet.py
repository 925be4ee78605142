"""Reads a parquet body of the model server.

pandas and pyarrow trust the file: 76 kB may become gigabytes, and a deep schema ends the process.
"""

import io
from typing import Any

import pandas as pd
from mlflow.pyfunc import scoring_server

from har.data.limits import RequestLimits
from har.data.parquet_footer import check_histograms
from har.serving.admission import parse_in_turn
from har.serving.bodies import COLUMN, check_rows
from har.serving.refusals import TooLarge, refuse

# A file of one column has a kilobyte. A schema of 100,000 levels, in 800 kB, ends the process.
MAX_FOOTER = 64_000
_MAGIC = b"PAR1"
# The others pack a gigabyte of zeros into some kB; images do not become smaller.
CODECS = ("SNAPPY", "UNCOMPRESSED")


def read_parquet(body: bytes, limits: RequestLimits) -> pd.DataFrame:
    """Return the table of a file with the one column `image`.

    Raises:
        MlflowException: it is no such file.
        TooLarge: it has more rows or bytes than `limits`, packed or unpacked.
    """
    if len(body) > limits.bytes:
        raise TooLarge(f"a body of {len(body):,} bytes, more than {limits.bytes:,}")
    if len(body) < 12 or body[:4] != _MAGIC or body[-4:] != _MAGIC:
        raise refuse("the body is not a parquet file")
    if (footer := int.from_bytes(body[-8:-4], "little")) > MAX_FOOTER:
        raise TooLarge(
            f"a parquet file with {footer:,} bytes of metadata, more than {MAX_FOOTER:,}"
        )
    try:
        cells = _read_cells(body, limits)
    # pyarrow's errors are of many types, and repeat what is in the file
    except (ValueError, OSError, NotImplementedError, MemoryError) as error:
        raise refuse(f"the parquet file cannot be read: {str(error)[:100]}") from None
    return pd.DataFrame({COLUMN: pd.Series(cells, dtype=object)})


def _read_cells(body: bytes, limits: RequestLimits) -> list[Any]:
    # imported when it is needed: it takes a second
    from pyarrow import parquet

    file = parquet.ParquetFile(
        io.BytesIO(body),
        thrift_string_size_limit=MAX_FOOTER,
        thrift_container_size_limit=MAX_FOOTER,
    )
    _check_column(file, body)
    check_rows(file.metadata.num_rows, limits)
    cells, size = [], 0
    # one row at a time: what rows share in the file is copied for each
    for batch in file.iter_batches(batch_size=1, columns=[COLUMN], use_threads=False):
        cells += batch.column(0).to_pylist()
        size += batch.nbytes
        if size > limits.bytes:
            raise TooLarge(f"images of more than {limits.bytes:,} bytes in a parquet file")
        check_rows(len(cells), limits)
    return cells


def _check_column(file: Any, body: bytes) -> None:
    """Raise an error unless the column is flat, of bytes or text, and unpacks to little more."""
    schema = file.metadata.schema
    columns = [schema.column(i) for i in range(len(schema))]
    at = [i for i, each in enumerate(columns) if each.path == COLUMN]
    if len(at) != 1:
        names = ", ".join(each.path for each in columns)[:80]
        raise refuse(f"a parquet file must have one column {COLUMN}: received {names or '(none)'}")
    if columns[at[0]].physical_type != "BYTE_ARRAY" or columns[at[0]].max_repetition_level:
        kind = columns[at[0]].physical_type
        raise refuse(f"a parquet file's column {COLUMN} must be of bytes or text, not {kind}")
    # with others, the next lines would end the process
    check_histograms(body, at[0], columns[at[0]].max_definition_level)
    for group in range(file.metadata.num_row_groups):
        codec = file.metadata.row_group(group).column(at[0]).compression
        if codec not in CODECS:
            raise refuse(
                f"a parquet file must be compressed with snappy or not at all, not {codec}"
            )


def read_parquets_of_ours(limits: RequestLimits) -> None:
    """Let MLflow's server, which this process is, read parquet bodies with `read_parquet`."""

    def parse(parquet_input: io.BytesIO) -> pd.DataFrame:
        body = parquet_input.getvalue()
        return parse_in_turn(lambda: read_parquet(body, limits), len(body))

    scoring_server.parse_parquet_input = parse
