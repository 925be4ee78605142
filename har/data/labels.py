"""Which image carries which label: Kaggle's CSV, a test file like it, or class folders."""

import warnings
from pathlib import Path, PureWindowsPath

import pandas as pd
from pandas.errors import ParserWarning

from har.data.sources import LABELS_FILE, TEST_FOLDER, TRAIN_FOLDER, Source, is_image_name
from har.data.summary import BadImage
from har.util.errors import UserError, first_line
from har.util.files import NOT_UTF8, printable

COLUMNS = ("part", "path", "label", "file", "row")


def read_labels(source: Source, test_file: str = "none") -> pd.DataFrame:
    """One row a labelled image: part (train or test), path (from the source's root), label,
    and the file and row that say so; empty texts as "".

    Raises:
        UserError: a CSV cannot be read, lacks a column, names a file out of its folder, has no
            row or one constant label; a test label that no training image has.
    """
    if source.layout == "class_folders":
        if test_file != "none":
            raise UserError(
                "a test file names images in the folder test/ of Kaggle's layout; received"
                f" {test_file!r} for the class folders of {source.root}"
            )
        return _read_class_folders(source)
    rows = read_csv(source.root / LABELS_FILE, TRAIN_FOLDER)
    if test_file == "none":
        return rows
    test = read_csv(find_test_file(source, test_file), TEST_FOLDER)
    if unknown := sorted(set(test["label"]) - set(rows["label"]) - {""}):
        raise UserError(
            f"{test_file} has labels that {LABELS_FILE} does not know: {', '.join(unknown)}"
        )
    return pd.concat([rows, test], ignore_index=True)


def find_test_file(source: Source, test_file: str) -> Path:
    """The test file as named from here, or beside the training labels.

    Raises:
        UserError: there is none.
    """
    for path in (Path(test_file), source.root / test_file):
        if path.is_file():
            return path
    raise UserError(f"no such test file: {test_file}, neither here nor in {source.root}")


def _read_class_folders(source: Source) -> pd.DataFrame:
    """Every image in a class folder, classes in alphabetical order."""
    rows = [
        ("train", printable(path.relative_to(source.root).as_posix()), folder.name, "", 0)
        for folder in source.image_folders
        for path in sorted(folder.rglob("*"))
        if is_image_name(path)
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


def read_csv(csv: Path, folder: str) -> pd.DataFrame:
    """The rows of a CSV with the columns filename and label; images lie in `folder`.

    Raises:
        UserError: as `read_labels`.
    """
    try:
        with warnings.catch_warnings():
            # pandas would only warn of rows longer than the header, and shift or cut them
            warnings.simplefilter("error", ParserWarning)
            rows = pd.read_csv(csv, dtype=str, keep_default_na=False, index_col=False)
    except (OSError, ValueError, ParserWarning) as error:
        raise UserError(f"{csv} cannot be read: {first_line(error)}") from error
    missing = [name for name in ("filename", "label") if name not in rows.columns]
    if missing:
        raise UserError(
            f"{csv} lacks the column {' and '.join(missing)}: expected filename and label;"
            f" found {', '.join(rows.columns)}"
        )
    labels = rows["label"].unique()
    if len(labels) < 2:
        named = f"every row is labelled {labels[0]!r}" if len(labels) else "it has no rows"
        raise UserError(f"{csv} cannot be learnt or scored from: {named}")
    for row, filename in enumerate(rows["filename"], start=1):
        _check_inside(csv, row, filename, folder)
    rows["path"] = [f"{folder}/{name}" if name else "" for name in rows["filename"]]
    rows = rows.assign(part=folder, file=csv.name, row=range(1, len(rows) + 1))
    return rows[list(COLUMNS)]


def _check_inside(csv: Path, row: int, filename: str, folder: str) -> None:
    """Raise a UserError if a name leads out of the folder: no typing mistake, so not skipped."""
    # the Windows kind knows both slashes and drive letters
    path = PureWindowsPath(filename)
    if path.anchor or ".." in path.parts:
        raise UserError(
            f"row {row} of {csv.name} names {filename!r}: paths must stay inside the folder"
            f" {folder}/"
        )


def check_rows(rows: pd.DataFrame) -> tuple[pd.DataFrame, list[BadImage]]:
    """The rows to open, and those that cannot even be looked for."""
    twice = rows["path"].duplicated() & (rows["path"] != "")
    reasons = pd.Series("", index=rows.index)
    reasons[twice] = "listed twice; the first row counts"
    reasons[rows["label"] == ""] = "the label is empty"
    reasons[rows["path"] == ""] = "the filename is empty"
    reasons[rows["path"].str.contains(NOT_UTF8)] = "the filename is not UTF-8"
    bad = [build_bad_image(rows.loc[index], reasons[index]) for index in rows.index[reasons != ""]]
    return rows[reasons == ""], bad


def build_bad_image(row: "pd.Series[str]", reason: str) -> BadImage:
    """One of `read_labels`' rows with the reason why it cannot be used."""
    path = row["path"]
    # as the CSV writes it: without the folder that its names start from
    filename = path.removeprefix(f"{row['part']}/") if row["file"] else path
    return BadImage(row["file"], int(row["row"]), filename, reason)
