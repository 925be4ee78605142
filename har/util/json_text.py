"""JSON that others may have written: whatever is wrong in it is a ValueError."""

import json
import math
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """Parse JSON; raise a ValueError if it is damaged, or nested more deeply than Python can."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def check_number(value: Any, name: str, low: float, high: float) -> float:
    """Return `value` if it is a number from `low` to `high`; else raise a ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        shown = repr(value)
        shown = shown if len(shown) <= 40 else f"{shown[:39]}…"
        raise ValueError(f"{name} is {shown}, no number from {low:g} to {high:g}")
    return value


def is_plain(value: Any, longest: int = 1000) -> bool:
    """Return True for a text of at most `longest` characters, a truth value or a finite number."""
    if isinstance(value, str):
        return len(value) <= longest
    return isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value))
