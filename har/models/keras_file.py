"""Keras files, checked before Keras reads them: they may be somebody else's.

Keras runs no code from them in its safe mode, but it allocates what they announce.
"""

import math
import zipfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import h5py

from har.util.json_text import parse_json

MAX_MEMBERS = 20
MAX_CONFIG_BYTES = 50_000_000
# All weights of a network: EfficientNetB7 has a quarter of a gigabyte.
MAX_WEIGHT_BYTES = 2_000_000_000
# What decides how large a layer is, and the most that it may be. The product of two numbers of
# channels is about the number of a layer's weights.
CHANNELS = ("units", "filters", "output_dim", "input_dim", "num_heads", "key_dim")
SIDES = (
    "batch_shape", "target_shape", "kernel_size", "pool_size", "size", "padding", "n",
    "projection_dim",
)  # fmt: skip
MAX_SIDE = 100_000


def check_keras_file(file: Path) -> None:
    """Raise a ValueError if a .keras file would take more memory than any network of ours."""
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if len(members) > MAX_MEMBERS:
            raise ValueError(f"{file.name} has {len(members):,} parts, more than {MAX_MEMBERS}")
        if (size := sum(each.file_size for each in members)) > MAX_WEIGHT_BYTES:
            raise ValueError(f"{file.name} unpacks to {size:,} bytes")
        config = archive.getinfo("config.json")
        if config.file_size > MAX_CONFIG_BYTES:
            raise ValueError(f"{file.name} describes its network in {config.file_size:,} bytes")
        _check_layers(parse_json(archive.read(config)))
        # not from the archive's stream, in which every step back starts from the beginning
        check_weights(BytesIO(archive.read("model.weights.h5")))


def _check_layers(config: Any) -> None:
    found = list(_list_numbers(config))
    for name, value in found:
        if name in (*CHANNELS, *SIDES) and value > MAX_SIDE:
            raise ValueError(f"a layer has {name} {value:,}, more than {MAX_SIDE:,}")
    channels = sorted(value for name, value in found if name in CHANNELS)
    if 4 * math.prod(channels[-2:]) > MAX_WEIGHT_BYTES:
        raise ValueError(f"layers have {channels[-2]:,} and {channels[-1]:,} channels")


def _list_numbers(config: Any) -> Iterator[tuple[str, int]]:
    """Yield every integer in a description, with its name."""
    waiting = [("", config)]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.items()
        elif isinstance(value, list):
            waiting += [(name, each) for each in value]
        elif type(value) is int:
            yield name, value


def check_weights(file: Any) -> None:
    """Raise a ValueError if the arrays of an HDF5 file are larger than any network of ours, or lie
    in other files.
    """
    total = 0

    def add(name: str, found: Any) -> None:
        nonlocal total
        if isinstance(found, h5py.Dataset):
            if found.external or found.is_virtual:
                raise ValueError(f"its array {name} lies in another file")
            # not its `nbytes`, which overflows
            total += math.prod(found.shape or ()) * found.dtype.itemsize

    with h5py.File(file, "r") as opened:
        opened.visititems(add)
    if total > MAX_WEIGHT_BYTES:
        raise ValueError(f"its arrays have {total:,} bytes, more than {MAX_WEIGHT_BYTES:,}")
