"""Reads .npz files, which may be damaged."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from har.util.errors import first_line

Arrays = dict[str, npt.NDArray[Any]]


def load_arrays(path: Path) -> Arrays:
    """Load every array of a .npz file, whose checksums are compared.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or no file of arrays alone.
    """
    try:
        # a pickle in the file is an error
        with path.open("rb") as file, np.load(file, allow_pickle=False) as found:
            return {name: found[name] for name in found.files}
    except FileNotFoundError:
        raise
    # depending on the byte, zipfile, zlib and NumPy raise a dozen kinds, MemoryError among them
    except Exception as error:
        raise ValueError(first_line(error)) from error
