"""When Python looks for garbage."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collect_garbage_later() -> Iterator[None]:
    """Let Python look for garbage only after the block, which builds what lives on: else it looks
    through all of that again and again.
    """
    thresholds = gc.get_threshold()
    # h5py switches the search on again whenever it closes a file; not so with a threshold of 0
    gc.set_threshold(0)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
