"""A file of arrays is read whole, or refused by one kind of error."""

import io
import os
import resource
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from har.training.arrays import load_arrays


def test_arrays_are_read_as_they_were_written(tmp_path: Path) -> None:
    values = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.uint32([7])}
    np.savez(tmp_path / "file.npz", **values)
    found = load_arrays(tmp_path / "file.npz")
    assert set(found) == set(values)
    for name, value in values.items():
        np.testing.assert_array_equal(found[name], value)
        assert found[name].dtype == value.dtype
    with pytest.raises(FileNotFoundError):
        load_arrays(tmp_path / "gone.npz")


def test_whichever_byte_is_changed_no_other_number_is_read(tmp_path: Path) -> None:
    """Among the errors are those of encryption, of compressions that nobody used, and of memory."""
    file = tmp_path / "file.npz"
    values = np.arange(12, dtype=np.float32)
    np.savez(file, features=values)
    data, refused = file.read_bytes(), 0
    for place in range(len(data)):
        for bits in (0x01, 0x08, 0x0E, 0xFF):
            damaged = bytearray(data)
            damaged[place] ^= bits
            file.write_bytes(damaged)
            try:
                found = load_arrays(file)
            except ValueError:
                refused += 1
                continue
            for value in found.values():
                np.testing.assert_array_equal(value, values)
    assert refused > 2 * len(data)


@pytest.mark.parametrize("left", [0, 1, 40, 100, -1])
def test_a_cut_file_is_refused(left: int, tmp_path: Path) -> None:
    file = tmp_path / "file.npz"
    np.savez(file, features=np.arange(12))
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(ValueError):
        load_arrays(file)


def header(shape: str, dtype: str = "<f4") -> bytes:
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def write_zip(data: bytes, count: int = 1, compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for number in range(count):
            archive.writestr(f"array_{number}.npy", data)
    return file.getvalue()


def overlap(data: bytes) -> bytes:
    """A zip whose thousand names are all of the same bytes."""
    whole = write_zip(data)
    start = whole.index(b"PK\x01\x02")
    end = whole.index(b"PK\x05\x06")
    entry, tail = whole[start:end], bytearray(whole[end:])
    tail[8:10] = tail[10:12] = (1000).to_bytes(2, "little")
    tail[12:16] = (1000 * len(entry)).to_bytes(4, "little")
    return whole[:start] + 1000 * entry + bytes(tail)


HOSTILE: dict[str, Callable[[Path], object]] = {
    "4 TB announced": lambda f: f.write_bytes(write_zip(header("(1000000000000,)") + bytes(8))),
    "8 GB announced": lambda f: f.write_bytes(write_zip(header("(2000000000,)") + bytes(8))),
    "a product beyond 64 bits": lambda f: f.write_bytes(write_zip(header(f"({2**40}, {2**40})"))),
    "a negative side": lambda f: f.write_bytes(write_zip(header("(-1, 4)") + bytes(16))),
    "a long text": lambda f: f.write_bytes(write_zip(header("()", f"<U{10**9}") + bytes(8))),
    "a deep header": lambda f: f.write_bytes(write_zip(header("(" * 9000))),
    "a bomb": lambda f: f.write_bytes(
        write_zip(header("(50000000,)") + bytes(2 * 10**8), compression=zipfile.ZIP_DEFLATED)
    ),
    "overlapping": lambda f: f.write_bytes(overlap(header("(250000,)") + bytes(10**6))),
    "objects": lambda f: f.write_bytes(write_zip(header("(1,)", "|O") + bytes(8))),
    "no array": lambda f: f.write_bytes(write_zip(b"text")),
    "a pipe": os.mkfifo,
    "a device": lambda f: f.symlink_to("/dev/zero"),
    "a folder": Path.mkdir,
    "ten terabytes": lambda f: (f.touch(), os.truncate(f, 10**13)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_takes_no_memory(name: str, tmp_path: Path) -> None:
    file = tmp_path / "file.npz"
    HOSTILE[name](file)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError):
        load_arrays(file)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB
