"""JSON of others: whatever is wrong is a ValueError."""

import math
from typing import Any

import pytest

from har.util.json_text import check_number, is_plain, parse_json


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"a":' * 100_000, "9" * 5000, b"\xff"])
def test_what_cannot_be_parsed(text: str | bytes) -> None:
    with pytest.raises(ValueError):
        parse_json(text)


@pytest.mark.parametrize("value", [None, "1", True, [], -1, 2, math.nan, math.inf, 10**400])
def test_what_is_no_number_in_range(value: Any) -> None:
    with pytest.raises(ValueError, match=r"count is .* no number from 0 to 1") as caught:
        check_number(value, "count", 0, 1)
    assert len(str(caught.value)) < 100


def test_plain_values() -> None:
    assert all(map(is_plain, ["text", 1, 1.5, True, ""]))
    assert not any(map(is_plain, [None, [], {}, math.nan, math.inf, "x" * 1001, b""]))
