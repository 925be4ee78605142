"""Reads .npz files, which may be damaged or somebody else's."""

import math
import os
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy

from har.util.errors import first_line
from har.util.files import open_regular_file

Arrays = dict[str, npt.NDArray[Any]]


def load_arrays(path: Path) -> Arrays:
    """Load every array of a .npz file, whose checksums are compared. It takes no more memory than
    the file has bytes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or no file of arrays alone.
    """
    try:
        with open_regular_file(path) as file:
            _check_sizes(file)
            # a pickle in the file is an error
            with np.load(file, allow_pickle=False) as found:
                return {name: found[name] for name in found.files}
    except FileNotFoundError:
        raise
    # depending on the byte, zipfile, zlib and NumPy raise a dozen kinds, MemoryError among them
    except Exception as error:
        raise ValueError(first_line(error)) from error


def _check_sizes(file: IO[bytes]) -> None:
    """Raise a ValueError if the arrays are announced to be larger than what is there: NumPy
    reserves the memory before it reads.
    """
    size = os.fstat(file.fileno()).st_size
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        # `np.savez` compresses nothing, and no bytes belong to two arrays
        if any(each.compress_type != zipfile.ZIP_STORED for each in members):
            raise ValueError("its arrays are compressed")
        if sum(each.file_size for each in members) > size:
            raise ValueError("its arrays are larger than the file")
        for each in members:
            with archive.open(each) as array:
                _check_header(array, each.file_size)
    file.seek(0)


def _check_header(array: IO[bytes], size: int) -> None:
    version = npy.read_magic(array)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, _, dtype = read(array)
    if math.prod(shape) * dtype.itemsize != size - array.tell():
        raise ValueError(f"an array of {shape} has another number of bytes")
