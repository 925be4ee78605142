"""A file of arrays is read whole, or refused by one kind of error."""

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
