"""Features that exceed the memory, in a file.

Shard by shard, the features of the cache are copied into one file, and a training reads from it the
rows of each batch, in the same random order as from memory. So no number changes, and no buffer
must be chosen: the system keeps in memory what fits. Mapping the shards themselves would spare the
copy, but needs an open file for each, more than the 1,024 that systems allow; and the cache may
delete them meanwhile.
"""

import math
import os
from dataclasses import dataclass
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import numpy.typing as npt

from har.training.feature_cache import OTHER_FOLDER, Features, features_folder
from har.util.errors import UserError
from har.util.units import format_bytes


@dataclass(frozen=True)
class PickedFeatures:
    """Some rows of a (views, rows, ...) array, read when they are asked for."""

    array: Features
    numbers: npt.NDArray[np.int64]

    @property
    def shape(self) -> tuple[int, ...]:
        """(views, picked rows, ...)."""
        return (len(self.array), len(self.numbers), *self.array.shape[2:])

    def __getitem__(self, key: tuple[Any, Any]) -> Features:
        views, rows = key
        return self.array[views, self.numbers[rows]]


def map_features(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Features:
    """Return an array in a file without a name, which is gone with the array or the process.

    Raises:
        UserError: the disk has no room for it.
    """
    size = math.prod(shape) * dtype.itemsize
    folder = features_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder) as file:
            # without room for all of it, a later write would end the process
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, max(1, size))
            return np.asarray(np.memmap(file, dtype, "r+", shape=shape))
    except OSError as error:
        raise UserError(
            f"the features do not fit the memory, and need {format_bytes(size, math.ceil)} of"
            f" {folder}: {error.strerror}; {OTHER_FOLDER}"
        ) from error
