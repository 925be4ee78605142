"""Labels of images: from Kaggle's CSV, a test file like it, or the names of class folders."""

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
    """Return one row for each labelled image, with the columns COLUMNS.

    `part` is train or test, `path` starts from the source's root, and `file` and `row` are the
    place in a CSV that names the image. Empty cells are "".
    """
    if source.layout == "class_folders":
        if test_file != "none":
            raise UserError(
                "--test-file needs Kaggle's layout, with the test images in a folder test/;"
                f" received {test_file!r} for the class folders of {source.root}"
            )
        return _read_class_folders(source)
    rows = read_csv(source.root / LABELS_FILE, TRAIN_FOLDER)
    if test_file == "none":
        return rows
    test = read_csv(find_test_file(source, test_file), TEST_FOLDER)
    if unknown := sorted(set(test["label"]) - set(rows["label"]) - {""}):
        raise UserError(
            f"{test_file} has labels that {LABELS_FILE} does not have: {', '.join(unknown)}"
        )
    return pd.concat([rows, test], ignore_index=True)


def find_test_file(source: Source, test_file: str) -> Path:
    """Find the test file from the working folder or in the source's folder."""
    for path in (Path(test_file), source.root / test_file):
        if path.is_file():
            return path
    raise UserError(f"no such test file: {test_file}, neither here nor in {source.root}")


def _read_class_folders(source: Source) -> pd.DataFrame:
    rows = [
        ("train", printable(path.relative_to(source.root).as_posix()), folder.name, "", 0)
        for folder in source.image_folders
        for path in sorted(folder.rglob("*"))
        if is_image_name(path)
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


def read_csv(csv: Path, folder: str) -> pd.DataFrame:
    """Read a CSV with the columns filename and label, whose images are in `folder`."""
    try:
        with warnings.catch_warnings():
            # pandas only warns about rows longer than the header, and shifts or cuts them
            warnings.simplefilter("error", ParserWarning)
            rows = pd.read_csv(csv, dtype=str, keep_default_na=False, index_col=False)
    except (OSError, ValueError, ParserWarning) as error:
        raise UserError(f"{csv} cannot be read: {first_line(error)}") from error
    if missing := [name for name in ("filename", "label") if name not in rows.columns]:
        raise UserError(
            f"{csv} lacks the column {' and '.join(missing)}: expected filename and label;"
            f" found {', '.join(rows.columns)}"
        )
    labels = rows["label"].unique()
    if len(labels) < 2:
        found = f"every row has the label {labels[0]!r}" if len(labels) else "it has no rows"
        raise UserError(f"{csv} must have at least 2 labels: {found}")
    for row, filename in enumerate(rows["filename"], start=1):
        # an error, not a skipped row: this is no typing mistake. Windows paths, because they know
        # both slashes and drive letters.
        path = PureWindowsPath(filename)
        if path.anchor or ".." in path.parts:
            raise UserError(
                f"row {row} of {csv.name} names {filename!r}: paths must stay inside the folder"
                f" {folder}/"
            )
    rows["path"] = [f"{folder}/{name}" if name else "" for name in rows["filename"]]
    rows = rows.assign(part=folder, file=csv.name, row=range(1, len(rows) + 1))
    return rows[list(COLUMNS)]


def check_rows(rows: pd.DataFrame) -> tuple[pd.DataFrame, list[BadImage]]:
    """Separate the rows whose image can be opened from those that are wrong in themselves."""
    twice = rows["path"].duplicated() & (rows["path"] != "")
    reasons = pd.Series("", index=rows.index)
    reasons[twice] = "listed twice; the first row counts"
    reasons[rows["label"] == ""] = "the label is empty"
    reasons[rows["path"] == ""] = "the filename is empty"
    reasons[rows["path"].str.contains(NOT_UTF8)] = "the filename is not UTF-8"
    bad = [build_bad_image(rows.loc[index], reasons[index]) for index in rows.index[reasons != ""]]
    return rows[reasons == ""], bad


def build_bad_image(row: "pd.Series[str]", reason: str) -> BadImage:
    """Build a BadImage from a row of `read_labels`."""
    path = row["path"]
    # a CSV gives names without its folder
    filename = path.removeprefix(f"{row['part']}/") if row["file"] else path
    return BadImage(row["file"], int(row["row"]), filename, reason)
