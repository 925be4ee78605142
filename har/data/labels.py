"""Labels of images: from a table such as Kaggle's, a test file like it, or class folders."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

import pandas as pd

from har.data.folders import find_file_kind, is_image
from har.data.kinds import READABLE, explain_kind
from har.data.layouts import TEST_FOLDER, TRAIN_FOLDER, Source
from har.data.names import NameFinder
from har.data.spelling import MAX_SHOWN, canonical_label, describe_spellings, find_spellings
from har.data.splits import LabelSpelling, Split
from har.data.summary import BadImage
from har.data.tables import read_table
from har.util.errors import UserError
from har.util.files import NOT_UTF8, storable

COLUMNS = ("part", "path", "label", "file", "row", "written")
# Files beside images that nobody takes for images.
DOCUMENTS = frozenset(
    {
        ".txt", ".md", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".html",
        ".pdf", ".doc", ".docx", ".xlsx", ".py", ".ipynb", ".log", ".cfg", ".ini", ".npy", ".npz",
        ".db", ".mat", ".pkl", ".toml",
    }
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """Labelled images, and what was found beside them.

    `rows` has the columns COLUMNS: `part` is train or test, `path` starts from the source's root,
    `file` and `row` are the place in a table that names the image as `written`. Empty cells are "".
    `notes` say what was assumed about names and labels. `strays` are files without a label.
    """

    rows: pd.DataFrame
    notes: tuple[str, ...]
    strays: tuple[str, ...]


def read_labels(source: Source, split: Split = Split()) -> Labelled:
    """Return the labelled images of a source, with labels in one spelling each.

    Raises:
        UserError: a table cannot be read or used, a class folder holds no image, or labels have
            several spellings that `split.label_spelling` does not decide about.
    """
    if source.layout == "table":
        rows, notes = _read_tables(source, split.test_file)
    else:
        _check_no_test_file(source, split.test_file)
        rows, notes = _read_class_folders(source)
    rows, more = _settle_spelling(rows, split.label_spelling)
    _check_test_labels(rows)
    strays = _find_strays(source, set(rows["path"]), split.test_file != "none")
    return Labelled(rows=rows, notes=(*notes, *more), strays=strays)


def _check_no_test_file(source: Source, test_file: str) -> None:
    if test_file != "none":
        raise UserError(
            "--test-file needs a table of labels such as Kaggle's, with the test images in a folder"
            f" test/; received {test_file!r} for the class folders of {source.root}. Put the test"
            " images into test/LABEL/ beside train/LABEL/ instead"
        )


def _read_tables(source: Source, test_file: str) -> tuple[pd.DataFrame, list[str]]:
    assert source.table is not None
    rows, notes = read_rows(source, source.table, source.image_folder, "train")
    if test_file == "none":
        return rows, notes
    test, more = read_rows(source, find_test_file(source, test_file), TEST_FOLDER, "test")
    return pd.concat([rows, test], ignore_index=True), notes + more


def find_test_file(source: Source, test_file: str) -> Path:
    """Find the test file from the working folder or in the source's folder."""
    for path in (Path(test_file), source.root / test_file):
        if path.is_file():
            return path
    raise UserError(f"no such test file: {test_file}, neither here nor in {source.root}")


def read_rows(
    source: Source, table: Path, folder: str, part: str
) -> tuple[pd.DataFrame, list[str]]:
    """Read a table whose images are in `folder` of the source; see `Labelled`."""
    # a missing training image must not be found as a test image of the same name
    other = f"{TEST_FOLDER}/" if part == "train" else f"{TRAIN_FOLDER}/"
    finder = NameFinder(
        {path for path in source.listing.files if not path.startswith(other)}, folder
    )
    found = read_table(table, finder.exists)
    rows = found.rows
    rows["label"], more = _canonical_labels(rows["label"])
    _check_labels(table, rows["label"])
    _check_paths(table, rows["filename"], folder)
    paths, notes = finder.find_all(rows["filename"])
    rows = rows.assign(
        path=paths,
        part=part,
        file=table.name,
        row=range(1, len(rows) + 1),
        written=rows["filename"],
    )
    return rows[list(COLUMNS)], [*found.notes, *(f"{table.name}: {each}" for each in more + notes)]


def _canonical_labels(written: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return labels as they are stored, and a note on those that were written otherwise."""
    written = list(written)
    canonical = {text: canonical_label(text) for text in dict.fromkeys(written)}
    changed = [text for text, label in canonical.items() if text != label]
    notes = []
    if changed:
        shown = ", ".join(f"{text!a} as {canonical[text]!r}" for text in changed[:MAX_SHOWN])
        more = f" and {len(changed) - MAX_SHOWN} more" if len(changed) > MAX_SHOWN else ""
        notes.append(f"labels without surrounding and invisible space: {shown}{more}")
    return [canonical[text] for text in written], notes


def _check_labels(table: Path, labels: "pd.Series[str]") -> None:
    distinct = labels.unique()
    if len(distinct) < 2:
        found = f"every row has the label {distinct[0]!r}" if len(distinct) else "it has no rows"
        raise UserError(f"{table} must have at least 2 labels: {found}")


def _check_paths(table: Path, filenames: "pd.Series[str]", folder: str) -> None:
    for row, filename in enumerate(filenames, start=1):
        # an error, not a skipped row: this is no typing mistake. Windows paths, because they know
        # both slashes and drive letters.
        path = PureWindowsPath(filename)
        if path.anchor or ".." in path.parts:
            raise UserError(
                f"row {row} of {table.name} names {filename!r}: paths must stay inside the folder"
                f" {folder or table.parent.name}/; write them as they are below it"
            )


def _read_class_folders(source: Source) -> tuple[pd.DataFrame, list[str]]:
    rows = []
    for split, folder in source.class_folders:
        files = source.listing.below(folder)
        images = [path for path in files if is_image(source.root, path)]
        if not images:
            _check_no_label(source, folder, files)
        # valid/ joins the images that validation is taken from
        part = "test" if split == "test" else "train"
        label = storable(os.path.basename(folder))
        rows += [(part, storable(path), label, "", 0, storable(path)) for path in images]
    table = pd.DataFrame(rows, columns=COLUMNS)
    table["label"], notes = _canonical_labels(table["label"])
    if source.layout == "split_folders":
        notes.append(_describe_split_folders(source, table))
    return table, notes


def _describe_split_folders(source: Source, table: pd.DataFrame) -> str:
    top = table["path"].str.split("/").str[0].value_counts()
    uses = {
        "train": "train the model",
        "valid": "join them; the validation images are drawn from both",
        "test": "are the test split",
    }
    folders = {split: folder.split("/")[0] for split, folder in source.class_folders}
    parts = [
        f"{top.get(folder, 0):,} images in {folder}/ {uses[split]}"
        for split in uses
        if (folder := folders.get(split))
    ]
    return "; ".join(parts)


def _check_no_label(source: Source, folder: str, files: list[str]) -> None:
    """Raise a UserError for a class folder without images; one of documents only is no label."""
    if files and all(os.path.splitext(path)[1].lower() in DOCUMENTS for path in files):
        return
    refused = [path for path in source.listing.refused if f"{path}/".startswith(f"{folder}/")]
    if not files and refused:
        found = f"{source.root / refused[0]}: {source.listing.refused[refused[0]]}"
    elif files:
        kind = find_file_kind(source.root / files[0])
        found = f"{len(files)} files, such as {files[0]}" + (f", a {kind}" if kind else "")
        found += f": {explain_kind(kind)}" if explain_kind(kind) else ""
    else:
        found = "it is empty"
    raise UserError(
        f"the class folder {source.root / folder} holds no image ({found}). Add images, or move the"
        " folder away if it is no label"
    )


def _settle_spelling(
    rows: pd.DataFrame, label_spelling: LabelSpelling
) -> tuple[pd.DataFrame, list[str]]:
    """Merge or refuse labels in several spellings; return notes on what was merged."""
    found = find_spellings(rows["label"])
    if not found or label_spelling == "keep":
        return rows, []
    if label_spelling == "stop":
        raise UserError(
            f"labels that may be one label in several spellings: {describe_spellings(found)}."
            " --label-spelling merge takes each most frequent spelling, --label-spelling keep keeps"
            " them apart"
        )
    merged = {label: next(iter(each)) for each in found for label in each}
    note = f"spellings merged into the first of each: {describe_spellings(found)}"
    return rows.assign(label=rows["label"].replace(merged)), [note]


def _check_test_labels(rows: pd.DataFrame) -> None:
    tested, trained = (
        set(rows.loc[rows["part"] == part, "label"]) - {""} for part in ("test", "train")
    )
    if unknown := sorted(tested - trained):
        raise UserError(
            f"test images have labels that no training image has: {', '.join(unknown)}; correct"
            " these labels, or add such images for training"
        )


def _find_strays(source: Source, used: set[str], test_is_labelled: bool) -> tuple[str, ...]:
    """Name the files that are images without a label, or lie among images, with what they are."""
    is_table = source.layout == "table"
    folders = [source.image_folder] if is_table else [folder for _, folder in source.class_folders]
    among = tuple(f"{folder}/" for folder in folders if folder)
    # Kaggle publishes no labels for test/
    unlabelled = f"{TEST_FOLDER}/" if is_table and not test_is_labelled else "/"
    strays = dict(source.listing.refused)
    for path in source.listing.files:
        if storable(path) in used or path.startswith(unlabelled):
            continue
        if path.startswith(among) or is_image(source.root, path):
            kind = find_file_kind(source.root / path)
            strays[path] = f"a {kind}" if kind not in READABLE and kind else ""
    return tuple(
        storable(f"{path} ({reason})" if reason else path)
        for path, reason in sorted(strays.items())
        if storable(path) not in used
    )


def check_rows(rows: pd.DataFrame) -> tuple[pd.DataFrame, list[BadImage]]:
    """Separate the rows whose image can be opened from those that are wrong in themselves."""
    first = rows.drop_duplicates("path").set_index("path")["label"]
    before = rows["path"].map(first)
    twice = rows["path"].duplicated()
    reasons = pd.Series("", index=rows.index, dtype=str)
    reasons[twice] = "listed twice; the first row counts"
    otherwise = twice & (before != rows["label"])
    reasons[otherwise] = "listed twice, before as " + before.map(repr) + "; the first row counts"
    reasons[rows["label"] == ""] = "the label is empty"
    reasons[rows["path"] == ""] = "the filename is empty"
    reasons[rows["path"].str.contains(NOT_UTF8)] = "the filename is not UTF-8"
    bad = [build_bad_image(rows.loc[index], reasons[index]) for index in rows.index[reasons != ""]]
    return rows[reasons == ""], bad


def build_bad_image(row: "pd.Series[str]", reason: str) -> BadImage:
    """Build a BadImage from a row of `Labelled`."""
    return BadImage(row["file"], int(row["row"]), row["written"], reason)
