"""Numbers with a unit that fits them."""

from collections.abc import Callable


def format_bytes(size: float, rounding: Callable[[float], int] = round) -> str:
    """Format a number of bytes with three digits, such as 1.24 MB; units are powers of 1000.

    With `math.ceil` for what is needed and `math.floor` for what is free, the two never look equal.
    """
    for unit in ("bytes", "kB", "MB", "GB"):
        digits = 2 if size < 10 else 1 if size < 100 else 0
        value = rounding(size) if unit == "bytes" else rounding(size * 10**digits) / 10**digits
        if value < 1000:
            break
        size /= 1000
    else:
        unit = "TB"
        value = rounding(size * 100) / 100
    return f"{value:,g} {unit}"


def format_seconds(seconds: float) -> str:
    """Format a time as minutes and seconds, such as 8 min 05 s; 12.3 s below a minute."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes:,} min {rest:02} s"
