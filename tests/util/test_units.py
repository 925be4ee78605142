"""A number of bytes has the unit that fits, and what is needed never looks like what is free."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from har.util.units import format_bytes


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (512, "512 bytes"),
        (1000, "1 kB"),
        (1234, "1.23 kB"),
        (9_999, "10 kB"),
        (160_000, "160 kB"),
        (999_600, "1 MB"),
        (84_700_000, "84.7 MB"),
        (20e9, "20 GB"),
        (1.24e9, "1.24 GB"),
        (999.9e9, "1 TB"),
        (3.5e12, "3.5 TB"),
    ],
)
def test_the_unit_fits(size: float, text: str) -> None:
    assert format_bytes(size) == text


@given(st.integers(0, 10**14), st.integers(1, 10**6))
def test_needed_and_free_differ(free: int, more: int) -> None:
    needed = free + more
    assert format_bytes(needed, math.ceil) != format_bytes(free, math.floor)
