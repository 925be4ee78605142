"""Tables of labels as people keep them: any separator, encoding, compression and usual names.

What is not Kaggle's `filename,label` in UTF-8 is read where there is one way to read it, and a note
says what was assumed. Anything else is an error that says what to change.
"""

import codecs
import csv
import io
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from har.data.folders import has_image_suffix
from har.data.kinds import explain_kind, name_kind
from har.util.errors import UserError, first_line
from har.util.places import Place, read_place

# About five million rows.
MAX_BYTES = 300_000_000
SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "vertical bar"}
ENCODINGS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# Usual names of the two columns, without case, spaces, `_` and `-`. The first is Kaggle's.
FILENAMES = (
    "filename", "file", "filepath", "path", "fname", "name", "id",
    "image", "imagename", "imagefile", "imagefilename", "imagepath", "imageid", "images",
    "img", "imgname", "imgfile", "imgpath", "imgid", "photo", "picture",
)  # fmt: skip
LABELS = (
    "label", "labels", "labelname", "class", "classname", "classlabel", "classes", "category",
    "categoryname", "target", "action", "actionname", "actionlabel", "activity", "tag", "y",
)  # fmt: skip
SPREADSHEETS = frozenset({".xlsx", ".xlsm", ".xls", ".ods", ".numbers"})
SAVE_AS_CSV = "a spreadsheet: save the table as CSV in UTF-8, with the columns filename,label"
# How a file of predictions begins.
PREDICTIONS = b"filename,label,probability,error"
Row = list[str]


@dataclass(frozen=True, kw_only=True)
class Table:
    """`rows` has the columns filename and perhaps label, with texts as written; `notes` say what
    was assumed to read them.
    """

    rows: pd.DataFrame
    notes: tuple[str, ...]


def read_table(path: Place, exists: Callable[[str], bool], *, labelled: bool = True) -> Table:
    """Read the file names of a table, and labels if it is `labelled`; `exists` tells if a file name
    is that of a file.

    Raises:
        UserError: the file cannot be read, or its columns are not clear; the message says which it
            has and what to change.
    """
    text, notes = _read_text(path)
    rows, separator = _parse(path, text)
    if separator != ",":
        notes.append(f"separated by {SEPARATORS[separator]}s")
    if not rows:
        raise UserError(f"{path} cannot be read: it is empty; expected the columns filename,label")
    header, rows, more = _find_header(rows, exists)
    _check_widths(path, header, rows)
    columns = {
        "filename": _choose_column(
            path, header, "filename", FILENAMES, lambda at: _count(rows, at, exists)
        )
    }
    if labelled:
        columns["label"] = _choose_column(path, header, "label", LABELS, None)
    notes += more or [
        f"column {header[at]!r} read as {name}"
        for name, at in columns.items()
        if header[at] != name
    ]
    texts = [[row[at] if at < len(row) else "" for at in columns.values()] for row in rows]
    return Table(
        rows=pd.DataFrame(texts, columns=list(columns), dtype=str),
        notes=tuple(f"{path.name}: {note}" for note in notes),
    )


def has_label_columns(path: Path) -> bool:
    """Return True if a file begins with a row that names a file column and a label column."""
    try:
        rows, _ = _parse(path, _read_text(path)[0], most=1)
    except UserError:
        return False
    return bool(rows) and all(_find_columns(rows[0], known) for known in (FILENAMES, LABELS))


def are_predictions(path: Path) -> bool:
    """Return True for a file that `har predict` wrote: its labels are not for training."""
    with path.open("rb") as file:
        return file.read(len(PREDICTIONS)) == PREDICTIONS


def _read_text(path: Place) -> tuple[str, list[str]]:
    """Return a file's text, and notes on its compression and encoding."""
    try:
        data = read_place(path, MAX_BYTES)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from error
    notes = []
    if (kind := name_kind(data[:1024])) == "gzip archive":
        data = _decompress(path, data)
        notes.append("compressed by gzip")
    elif path.suffix.lower() in SPREADSHEETS:
        raise UserError(f"{path} is {SAVE_AS_CSV}")
    elif kind and not kind.endswith("text"):
        raise UserError(f"{path} is no table of labels but a {kind}: {explain_kind(kind)}")
    text, encoding = _decode(path, data)
    return text, notes + ([f"encoding {encoding}"] if encoding != "utf-8" else [])


def _decompress(path: Place, data: bytes) -> bytes:
    unpack = zlib.decompressobj(wbits=31)
    try:
        text = unpack.decompress(data, MAX_BYTES)
    except zlib.error as error:
        raise UserError(f"{path} cannot be decompressed: {first_line(error)}") from error
    if not unpack.eof:
        raise UserError(f"{path} is cut, or more than {MAX_BYTES:,} bytes when decompressed")
    return text


def _decode(path: Place, data: bytes) -> tuple[str, str]:
    for mark, encoding in ENCODINGS:
        if data.startswith(mark):
            return _decode_as(path, data, encoding), encoding.replace("-sig", "")
    # every second byte of English text in UTF-16 is zero
    for encoding, zeros in (("utf-16-le", data[1:200:2]), ("utf-16-be", data[:200:2])):
        if len(zeros) > 1 and zeros.count(0) > len(zeros) * 0.9:
            return _decode_as(path, data, encoding), encoding
    if b"\0" in data:
        raise UserError(f"{path} is no text: it has zero bytes; save it as CSV in UTF-8")
    try:
        return data.decode("utf-8"), "utf-8"
    except UnicodeDecodeError:
        # every byte is a character there, as in the tables of older programs
        return data.decode("cp1252", "replace"), "windows-1252, because it is not UTF-8"


def _decode_as(path: Place, data: bytes, encoding: str) -> str:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not {encoding}, as it begins: {first_line(error)}") from error


def _parse(path: Place, text: str, most: int | None = None) -> tuple[list[Row], str]:
    """Return the rows that are not empty, at most `most`, and the separator of the first one."""
    first = next((line for line in io.StringIO(text) if line.strip()), "")
    separator = max(SEPARATORS, key=first.count)
    rows: list[Row] = []
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        for row in reader:
            if row and any(row):
                rows.append(row)
            if len(rows) == most:
                break
    except csv.Error as error:
        raise UserError(
            f"{path} cannot be read: line {reader.line_num}: {first_line(error)}"
        ) from error
    return rows, separator


def _find_header(
    rows: list[Row], exists: Callable[[str], bool]
) -> tuple[Row, list[Row], list[str]]:
    """Return the header, the rows below it, and notes; a table may begin with its first image."""
    first = [cell.strip() for cell in rows[0]]
    if _find_columns(first, FILENAMES) or _find_columns(first, LABELS):
        return first, rows[1:], []
    names = [at for at, cell in enumerate(first) if exists(cell) or has_image_suffix(cell)]
    if len(names) != 1 or len([cell for cell in first if cell]) != 2:
        return first, rows[1:], []
    header = ["filename" if at == names[0] else "label" for at in range(len(first))]
    order = "filename,label" if names[0] == 0 else "label,filename"
    return header, rows, [f"no header: columns read as {order}"]


def _check_widths(path: Place, header: Row, rows: list[Row]) -> None:
    """Raise a UserError for a row with more cells than the header, unless those are empty."""
    for number, row in enumerate(rows, start=1):
        if any(cell.strip() for cell in row[len(header) :]):
            raise UserError(
                f"{path} cannot be read: row {number} has {len(row)} cells, the header"
                f" {len(header)}; write a name or label that has a comma in double quotes"
            )


def _normalise(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).casefold()


def _find_columns(header: Row, known: tuple[str, ...]) -> list[int]:
    """Return the columns with a known name; the first known name alone if it is there."""
    named = [_normalise(cell) for cell in header]
    exact = [at for at, name in enumerate(named) if name == known[0]]
    return exact or [at for at, name in enumerate(named) if name in known]


def _count(rows: list[Row], column: int, exists: Callable[[str], bool]) -> int:
    return sum(exists(row[column]) for row in rows[:200] if column < len(row))


def _choose_column(
    path: Place,
    header: Row,
    wanted: str,
    known: tuple[str, ...],
    count: Callable[[int], int] | None,
) -> int:
    found = _find_columns(header, known)
    if len(found) > 1 and count:
        best = sorted(found, key=count, reverse=True)
        found = best[:1] if count(best[0]) > count(best[1]) else found
    if len(found) == 1:
        return found[0]
    columns = ", ".join(header)
    if found:
        several = " and ".join(repr(header[at]) for at in found)
        raise UserError(f"{path} has several {wanted} columns: {several}; call one {wanted}")
    raise UserError(
        f"{path} lacks the column {wanted}: expected the columns filename,label; found {columns}."
        f" Rename the column with the {'names of the images' if count else 'labels'} to {wanted}"
    )
