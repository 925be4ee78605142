"""Layouts of data folders: recognises the way in which a folder stores images and labels."""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from har.data.folders import (
    Listing,
    find_file_kind,
    has_image_suffix,
    is_hidden,
    is_image,
    list_files,
    visible_folders,
)
from har.data.kinds import READABLE, explain_kind
from har.data.manifest import is_prepared
from har.data.names import NameFinder
from har.data.tables import (
    SAVE_AS_CSV,
    SPREADSHEETS,
    are_predictions,
    has_label_columns,
    read_table,
)
from har.util.errors import UserError
from har.util.escaping import for_terminal

# The folder in the archive of Kaggle's data set.
KAGGLE_FOLDER = "Human Action Recognition"
LABELS_FILE = "Training_set.csv"
TRAIN_FOLDER = "train"
TEST_FOLDER = "test"
# Usual names of the folders of a split, by what becomes of their images.
SPLIT_FOLDERS = {
    "train": ("train", "training", "train_set", "training_set"),
    "valid": ("valid", "val", "validation", "dev", "valid_set", "validation_set"),
    "test": ("test", "testing", "test_set", "testing_set"),
}
SPLIT_NAMES = {name for names in SPLIT_FOLDERS.values() for name in names}
# Folders that only hold the images or the whole data set, so that their names are no labels.
WRAPPERS = {"images", "image", "imgs", "img", "data", "dataset", "datasets", "photos", "pictures"}
# Tables of labels by their names without endings, the likeliest first; "" is any name.
LABELS_TABLE = (LABELS_FILE.lower().split(".")[0],)
ANY_TABLE = (*SPLIT_FOLDERS["train"], "labels", "annotations", "metadata", "")
TABLE_SUFFIXES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
EXPECTED = (
    "expected one folder of images for each label; or such folders in train/ (and valid/, test/);"
    f" or {LABELS_FILE} with the columns filename,label beside a folder {TRAIN_FOLDER}/"
)


@dataclass(frozen=True, kw_only=True)
class Source:
    """A folder of images and the way its labels are stored.

    `layout` is table (file names and labels in the file `table`, as Kaggle's Training_set.csv
    beside train/), class_folders (one folder of images for each label), split_folders (class
    folders in train/ and perhaps valid/ and test/), or prepared (a manifest, with the images
    elsewhere). `why` says how the folder was chosen. `listing` has the files of a folder that is
    not prepared.
    """

    name: str
    root: Path
    why: str
    layout: Literal["table", "class_folders", "split_folders", "prepared"]
    table: Path | None = None
    listing: Listing = field(repr=False, compare=False)

    @property
    def image_folder(self) -> str:
        """The folder in which a table's file names are expected; "" for the data folder itself."""
        return TRAIN_FOLDER if (self.root / TRAIN_FOLDER).is_dir() else ""

    @property
    def class_folders(self) -> list[tuple[str, str]]:
        """(split, folder) for each class folder; the split is train, valid or test."""
        tops = [("train", "")]
        if self.layout == "split_folders":
            tops = sorted(_find_split_folders(self.root).items())
        return [
            (split, f"{top}/{folder.name}" if top else folder.name)
            for split, top in tops
            for folder in visible_folders(self.root / top)
        ]

    @property
    def has_test_folder(self) -> bool:
        """True if the data says itself which labelled images are for test."""
        return self.layout == "split_folders" and any(
            split == "test" for split, _ in self.class_folders
        )


def folder_source(folder: Path, why: str) -> Source:
    """Recognise what a folder holds, or a table of labels; see `Source`.

    The data may also lie in a folder inside that only wraps it, as unpacked archives have.
    """
    if folder.exists() and not folder.is_dir():
        return _table_source(folder, why)
    if not folder.is_dir():
        raise UserError(_explain_missing(folder, why))
    name = for_terminal(folder.resolve().name)
    if is_prepared(folder):
        root = folder.resolve()
        return Source(name=name, root=root, why=why, layout="prepared", listing=Listing({}))
    for root in (folder, *_find_wrapped(folder)):
        if source := _recognise(root.resolve(), why, inside=root != folder):
            return replace(source, name=name)
    raise UserError(f"{folder} ({why}) {_explain_unknown(folder)}")


def _table_source(file: Path, why: str) -> Source:
    kind = find_file_kind(file)
    if kind in READABLE:
        raise UserError(
            f"{file} ({why}) is one picture: to classify it, `har classify {file}`; to train, give"
            " a folder of pictures"
        )
    if file.name.lower().endswith(TABLE_SUFFIXES) or has_label_columns(file):
        root = file.parent.resolve()
        return Source(
            name=for_terminal(root.name),
            root=root,
            why=why,
            layout="table",
            table=root / file.name,
            listing=list_files(root),
        )
    what = f"a {kind}: {explain_kind(kind)}" if kind else "a file of an unknown kind"
    if file.suffix.lower() in SPREADSHEETS:
        what = SAVE_AS_CSV
    raise UserError(f"{file} ({why}) is {what}; {EXPECTED}")


def _explain_missing(folder: Path, why: str) -> str:
    text = f"no such folder: {folder} ({why})"
    if re.fullmatch(r"[\w-]+/[\w.-]+", str(folder)):
        return (
            f"{text}; if it is the name of a Kaggle data set: `kaggle datasets download {folder}"
            " --unzip -p DIR`, then --data DIR; --data kaggle downloads this project's own"
        )
    return text


def _find_wrapped(folder: Path, depth: int = 3) -> Iterator[Path]:
    """Yield the folders inside that may hold the whole data set."""
    inside = list(visible_folders(folder))
    for each in inside:
        known = each.name == KAGGLE_FOLDER or each.name.casefold() in WRAPPERS
        if known or len(inside) == 1:
            yield each
            if depth:
                yield from _find_wrapped(each, depth - 1)


def _recognise(root: Path, why: str, *, inside: bool) -> Source | None:
    """Recognise one folder; `inside` if it is not the folder that the user named."""
    source = Source(
        name=for_terminal(root.name),
        root=root,
        why=f"{why}, its folder {root.name}/" if inside else why,
        layout="class_folders",
        listing=list_files(root),
    )
    tables = _list_tables(root)
    if table := _choose_table(tables, LABELS_TABLE):
        return replace(source, layout="table", table=table)
    if _has_split_folders(source):
        return replace(source, layout="split_folders")
    if table := _choose_table([each for each in tables if _lists_files(source, each)]):
        return replace(source, layout="table", table=table)
    labels = _find_folders_with_images(root, source.listing)
    # without this, the folders of one label would become labels
    wraps = not inside or root.name == KAGGLE_FOLDER or root.name.casefold() in WRAPPERS
    if len(labels) >= 2 and wraps and not all(each.casefold() in SPLIT_NAMES for each in labels):
        _check_no_split_among_labels(root, labels)
        return source
    # its error says what is wrong with the table
    table = _choose_table(tables)
    return replace(source, layout="table", table=table) if table else None


def _check_no_split_among_labels(root: Path, labels: list[str]) -> None:
    """Raise a UserError if a folder of a split lies among class folders; `train` may be a label."""
    for label in labels:
        deeper = next(visible_folders(root / label), None) is not None
        if label.casefold() in SPLIT_NAMES and (label.casefold() != "train" or deeper):
            others = ", ".join(each for each in labels if each != label)
            raise UserError(
                f"{root} has the folder {label}/ among folders that may be labels: {others}. Move"
                f" {label}/ away (`har predict` classifies images without labels), or the others"
                " into train/"
            )


def _list_tables(root: Path) -> list[Path]:
    return [
        path
        for path in sorted(root.iterdir())
        if path.name.lower().endswith(TABLE_SUFFIXES)
        and not is_hidden(path.name)
        and path.is_file()
        and (path.name == LABELS_FILE or (has_label_columns(path) and not are_predictions(path)))
    ]


def _choose_table(tables: list[Path], names: tuple[str, ...] = ANY_TABLE) -> Path | None:
    """Return the table with the first of these names, without its ending; "" is any name."""
    for name in names:
        named = [path for path in tables if name in ("", path.name.lower().split(".")[0])]
        if len(named) > 1:
            several = ", ".join(str(path) for path in named)
            raise UserError(f"several tables of labels: {several}; name one as --data")
        if named:
            return named[0]
    return None


def _lists_files(source: Source, table: Path) -> bool:
    """Return True if at least half of the first names in a table are those of files."""
    finder = NameFinder(source.listing.files, source.image_folder)
    try:
        names = read_table(table, finder.exists).rows["filename"].head(100).tolist()
    except UserError:
        return False
    return 2 * sum(map(finder.exists, names)) >= len(names) > 0


def _find_split_folders(root: Path) -> dict[str, str]:
    """Map train, valid and test to the names of their folders in `root`, if there are such."""
    by_name = {folder.name.casefold(): folder.name for folder in visible_folders(root)}
    return {
        split: by_name[name]
        for split, names in SPLIT_FOLDERS.items()
        for name in names
        if name in by_name
    }


def _has_split_folders(source: Source) -> bool:
    """Return True if all folders of images are those of splits, and train has class folders."""
    found = _find_split_folders(source.root)
    with_images = _find_folders_with_images(source.root, source.listing)
    return (
        "train" in found
        and set(with_images) <= set(found.values())
        and bool(_find_folders_with_images(source.root, source.listing, f"{found['train']}/"))
    )


def _find_folders_with_images(root: Path, listing: Listing, inside: str = "") -> list[str]:
    """Find the folders directly in `root`, or in its folder `inside`, that hold an image at any
    depth.
    """
    files = defaultdict(list)
    for path in listing.files:
        folder, slash, _ = path.removeprefix(inside).partition("/")
        if slash and path.startswith(inside):
            files[folder].append(path)
    return [
        folder
        for folder, paths in files.items()
        # most files are known by their names
        if any(map(has_image_suffix, paths)) or any(is_image(root, path) for path in paths)
    ]


def _explain_unknown(folder: Path) -> str:
    """Say what a folder holds instead of a data set, and what to do."""
    listing = list_files(folder)
    with_images = _find_folders_with_images(folder, listing)
    loose = [path for path in listing.files if "/" not in path and is_image(folder, path)]
    files = [path for path in listing.files if "/" not in path]
    sheets = [path for path in files if Path(path).suffix.lower() in SPREADSHEETS]
    archives = [path for path in files if find_file_kind(folder / path).endswith("archive")]
    if sheets:
        found = f"holds {sheets[0]}, {SAVE_AS_CSV}"
    elif len(with_images) == 1:
        found = (
            f"holds images in one folder only, {with_images[0]}/. If its folders are the labels,"
            f" give --data {folder / with_images[0]}; every label needs a folder with images"
        )
    elif with_images:
        found = f"holds {', '.join(with_images)}, but neither class folders in them nor a table"
    elif loose:
        found = (
            f"holds {len(loose)} images without labels. `har predict --data {folder}` classifies"
            " them; to train, put the images of each label into a folder"
        )
    elif archives:
        found = f"holds {archives[0]}: unpack it, and give the folder with the images"
    else:
        found = "holds no images" if listing.files else "is empty"
    inside = [each.name for each in visible_folders(folder)]
    without = [name for name in inside if name not in with_images][:5]
    empty = f"; no images in {', '.join(without)}" if without else ""
    return f"{found}{empty}; {EXPECTED}"
