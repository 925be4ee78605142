"""Parquet bodies: files as images, and files that would cost much more than they weigh."""

import io
import struct
import subprocess
import sys
from typing import Any

import pyarrow as pa
import pytest
from mlflow.exceptions import MlflowException
from pyarrow import parquet

from har.data.limits import SERVED_REQUEST
from har.serving.parquet import read_parquet
from har.serving.refusals import TooLarge


def file_of(column: Any, name: str = "image", **options: Any) -> bytes:
    buffer = io.BytesIO()
    parquet.write_table(pa.table({name: column}), buffer, **options)
    return buffer.getvalue()


def varint(number: int) -> bytes:
    found = b""
    while number >= 128:
        found += bytes([number & 127 | 128])
        number >>= 7
    return found + bytes([number])


def deep(levels: int) -> bytes:
    """A file whose schema is a column in groups in groups, in the words of Thrift."""
    group, leaf = b"\x35\x02\x18\x01s\x15\x02\0", b"\x15\x0c\x25\x02\x18\x05image\0"
    footer = b"\x15\x04\x19\xfc" + varint(levels + 1) + group * levels + leaf
    footer += b"\x16\0\x19\x0c\0"
    return b"PAR1" + footer + struct.pack("<I", len(footer)) + b"PAR1"


@pytest.mark.parametrize("cells", [[b"a", None, b"b"], ["a", None, "b"], []])
@pytest.mark.parametrize("codec", ["snappy", "none"])
def test_a_file_is_a_table(cells: list[Any], codec: str) -> None:
    column = pa.array(cells, None if cells else pa.binary())
    table = read_parquet(file_of(column, compression=codec), SERVED_REQUEST)
    assert table["image"].tolist() == cells


ZEROS = b"\0" * 2_000_000
REFUSED = {
    "a gigabyte of zeros": lambda: file_of(
        pa.array([ZEROS] * 50, pa.large_binary()), use_dictionary=False
    ),
    "the same in zstd": lambda: file_of(pa.array([ZEROS] * 50), compression="zstd"),
    "one value for all rows": lambda: file_of(pa.array([ZEROS] * 50)),
    "a prefix for all rows": lambda: file_of(
        pa.array([ZEROS] * 50), use_dictionary=False, column_encoding="DELTA_BYTE_ARRAY"
    ),
    "many rows": lambda: file_of(pa.array([b"a"] * 2_000_000)),
    "lists": lambda: file_of(pa.array([[b"x"] * 1000] * 1000)),
    "numbers": lambda: file_of(pa.array([1])),
    "another column": lambda: file_of(pa.array([b"a"]), name="picture"),
    "a deep schema": lambda: deep(5_000),
    # pyarrow itself ends the process here
    "a schema that is too deep": lambda: deep(100_000),
    "a broken file": lambda: file_of(pa.array([b"a"]))[:-20] + b"\0" * 16 + b"PAR1",
    "no file": lambda: b"junk",
    "many bytes": lambda: b"PAR1" + b"\0" * 36_000_000 + b"PAR1",
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_files_are_refused(name: str) -> None:
    with pytest.raises(MlflowException) as caught:
        read_parquet(REFUSED[name](), SERVED_REQUEST)
    assert caught.value.get_http_status_code() in (400, 413)
    large = {"a gigabyte of zeros", "one value for all rows", "a prefix for all rows", "many rows"}
    if name in large | {"a schema that is too deep", "many bytes"}:
        assert isinstance(caught.value, TooLarge)
    assert len(str(caught.value)) < 300


FUZZ = """
import sys
import numpy as np
from mlflow.exceptions import MlflowException
from har.data.limits import SERVED_REQUEST
from har.serving.parquet import read_parquet
from har.serving.refusals import TooLarge

data = bytes.fromhex(sys.argv[1])
rng = np.random.default_rng(0)
for place in range(4, len(data)):
    for value in (0, 1, 3, 255, data[place] ^ 1, data[place] ^ 128, int(rng.integers(256))):
        damaged = data[:place] + bytes([value]) + data[place + 1 :]
        try:
            read_parquet(damaged, SERVED_REQUEST)
        except (MlflowException, TooLarge):
            pass
print("done")
"""


@pytest.mark.parametrize("nullable", [True, False])
def test_no_damaged_file_ends_the_process(nullable: bool) -> None:
    """pyarrow 25 ends it at a histogram whose length is not what it expects."""
    schema = pa.schema([pa.field("image", pa.binary(), nullable)])
    table = pa.table({"image": [b"\xff\xd8one", b"two"]}, schema)
    buffer = io.BytesIO()
    parquet.write_table(table, buffer)
    command = [sys.executable, "-c", FUZZ, buffer.getvalue().hex()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr[-2000:]
