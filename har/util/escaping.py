"""Foreign text made harmless for the terminal, for CSV files and for Markdown.

Names of files, labels, runs and data sets are foreign, and so is all that a store, a server or a
folder answers. HTML pages escape by themselves (`har.data.pictures.render_page`).
"""

import csv
import re
from typing import Any, Literal

# Letters from Arabic to Sinhala, and pictures: between two of them, a zero-width joiner or
# non-joiner belongs to the spelling.
_JOINED = r"\u0600-\u0dff\u2190-\u2bff\ufe0f\U0001f000-\U0001faff"
# Characters before a variation selector that makes a picture of them.
_PICTURED = r"#*0-9\xa9\xae\u200d\u203c-\u3299\U0001f000-\U0001faff"
# Characters that move the cursor, end the line, reorder the text or cannot be seen, and halves of
# characters, which no terminal can print.
_HIDDEN = re.compile(
    r"[\x00-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b\u200e\u200f"
    r"\u2028-\u202e\u2060-\u206f\u3164\ud800-\udfff\ufe00-\ufe0d\ufeff\uffa0\ufff0-\ufffb"
    r"\ufffe\uffff\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
    rf"|(?<![{_JOINED}])[\u200c\u200d]|[\u200c\u200d](?![{_JOINED}])"
    rf"|(?<![{_PICTURED}])[\ufe0e\ufe0f]"
)


def for_terminal(text: str) -> str:
    r"""Escape what a terminal would obey or hide: a line break becomes `\n`, ESC becomes `\x1b`.

    Escape names before they are joined into lines, or a line break in a name begins a false line.
    """
    return _HIDDEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


# Spreadsheets run what begins with one of these, also in its full width, if more follows.
_FORMULA = "[=+\\-@\uff1d\uff0b\uff0d\uff20](?s:.)"
# What they skip before it.
_BLANK = r'(?:[^\S\t\r\n]|["\x00-\x08\x0b\x0c\x0e-\x1f\xad\u200b-\u200f\u2060\ufeff])'
# A spreadsheet that expects semicolons or tabs begins a cell after each of them.
_CELL_START = r"(?:\A|(?<=[;\t\r\n]))"
_UNSAFE_CELL = re.compile(rf"{_CELL_START}(?={_BLANK}*{_FORMULA}|')|\A(?=[\t\r\n])")
_APOSTROPHE = re.compile(f"{_CELL_START}'")


def for_csv(cell: Any) -> Any:
    """Escape a cell that a spreadsheet would run: an apostrophe makes text of it.

    Numbers and other values stay as they are. `from_csv` restores the text.
    """
    return _UNSAFE_CELL.sub("'", cell) if isinstance(cell, str) else cell


def from_csv(cell: str) -> str:
    """Restore a cell that `for_csv` escaped; a cell that it did not write stays as it is."""
    restored = _APOSTROPHE.sub("", cell)
    return restored if for_csv(restored) == cell else cell


def csv_quoting(cells: Any) -> Literal[0, 2]:
    r"""Return the quoting with which `cells` can be read back.

    A writer whose lines end in `\n` does not quote a lone `\r`, and readers end the line there.
    """
    found = any(isinstance(cell, str) and "\r" in cell for cell in cells)
    return csv.QUOTE_NONNUMERIC if found else csv.QUOTE_MINIMAL


def format_csv(table: Any) -> str:
    """Format a pandas DataFrame as CSV without its index, with every text escaped."""
    texts = table.select_dtypes(exclude=["number", "bool"])
    escaped = table.assign(**{name: texts[name].map(for_csv) for name in texts})
    quoting = csv_quoting(cell for name in texts for cell in texts[name])
    escaped = escaped.rename(columns=for_csv)
    return str(escaped.to_csv(index=False, lineterminator="\n", quoting=quoting))


def for_markdown(text: str) -> str:
    """Escape text so that a Markdown page shows it as it is, on one line.

    MLflow shows descriptions with Showdown, which knows these backslashes. It would make links of
    addresses and names of users.
    """
    escaped = re.sub(r"[\\`*_{}\[\]()#+.!~=|-]", r"\\\g<0>", for_terminal(text))
    entities = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "@": "&#64;", ":": "&#58;"}
    return re.sub("[&<>@:]", lambda found: entities[found[0]], escaped)
