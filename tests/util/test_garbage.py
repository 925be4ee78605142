"""Python looks for garbage when what lives on is built."""

import gc

import pytest

from har.util.garbage import collect_garbage_later


def test_garbage_waits_for_the_end_of_the_block() -> None:
    def litter() -> int:
        """Make rings that only a search for garbage finds; count the searches."""
        before = sum(each["collections"] for each in gc.get_stats())
        for _ in range(100_000):
            ring: list = []
            ring.append(ring)
        return sum(each["collections"] for each in gc.get_stats()) - before

    thresholds = gc.get_threshold()
    with pytest.raises(KeyError), collect_garbage_later():
        assert litter() == 0
        raise KeyError
    assert gc.get_threshold() == thresholds
    assert litter() > 0
