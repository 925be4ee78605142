"""From a folder of images to a checked manifest: every file opened, duplicates grouped,
test images held out.
"""

import hashlib
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

import pandas as pd
from pandas.errors import ParserWarning

from har import manifest as manifests
from har.errors import UserError, first_line
from har.images import ImageError, decode_rgb, is_plain_jpeg, open_image
from har.manifest import Manifest
from har.progress import progress, say
from har.sources import LABELS_FILE, Source, cache_folder, find_source
from har.splits import hold_out

IMAGES_FOLDER = "train"
# More bad rows than this share are a broken download, not a few broken files.
MAX_BAD_SHARE = 0.02
TEST_FRACTION = 0.15
SPLIT_SEED = 0
# Part of the cache's key: raise it when a manifest would come out different.
PREPARE_VERSION = 1


@dataclass(frozen=True)
class Bad:
    """A row of the CSV that cannot be used; `row` counts from 1 below the header."""

    row: int
    filename: str
    reason: str

    def __str__(self) -> str:
        return f"row {self.row}, {self.filename!r}: {self.reason}"


@dataclass(frozen=True, kw_only=True)
class Split:
    """How test images are held out where nothing else is said."""

    test_fraction: float = TEST_FRACTION
    split_seed: int = SPLIT_SEED


def load_manifest(
    data: str,
    test_fraction: float | None = None,
    split_seed: int | None = None,
    default: Split = Split(),
) -> Manifest:
    """The manifest for `--data`: a prepared folder is read; anything else is prepared into
    the cache, or taken from there if its files have not changed since.

    Raises:
        UserError: as `prepare` and `manifest.read`; or the folder was prepared with another
            test fraction or split seed than the ones given.
    """
    source = find_source(data)
    if source.prepared:
        found = manifests.read(source.root)
        asked = {"test_fraction": test_fraction, "split_seed": split_seed}
        for name, value in asked.items():
            if value is not None and value != found.summary[name]:
                raise UserError(
                    f"{source.root} was prepared with {name}={found.summary[name]}; received"
                    f" {value}. Leave the option out, or prepare the images anew"
                )
        return announced(found, source.why)
    fraction = default.test_fraction if test_fraction is None else test_fraction
    seed = default.split_seed if split_seed is None else split_seed
    kept = cache_folder() / "prepared" / fingerprint(source, fraction, seed)
    # a damaged entry of our own cache is no business of the user's: it is made again
    with suppress(UserError):
        return announced(manifests.read(kept), source.why)
    return prepare(source, kept, fraction, seed)


def fingerprint(source: Source, test_fraction: float, split_seed: int) -> str:
    """Changes when a file of the source does: by name, size and time, without reading images."""
    parts = [source.name, str(source.root), str(PREPARE_VERSION), str(test_fraction)]
    parts.append(str(split_seed))
    folder = source.root / IMAGES_FOLDER
    for path in (source.root / LABELS_FILE, *sorted(folder.rglob("*"))):
        stat = path.lstat()
        parts.append(f"{path} {stat.st_size} {stat.st_mtime_ns}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def prepare(
    source: Source, out: Path, test_fraction: float = TEST_FRACTION, split_seed: int = SPLIT_SEED
) -> Manifest:
    """Check every image that the CSV names, group duplicates, hold out test, write `out`.

    Raises:
        UserError: missing columns, a path out of the folder, one constant label, too few
            images, or more than 2 % of the rows without a readable image.
    """
    if source.prepared:
        raise UserError(f"{source.root} is prepared already: give the folder of its images")
    rows = read_rows(source.root / LABELS_FILE)
    usable, bad = check_rows(rows)
    images, unreadable = inspect_images(source.root, usable)
    bad = sorted(bad + unreadable, key=lambda each: each.row)
    check_bad_share(bad, len(rows), source.root / LABELS_FILE)
    table = build_table(rows, images)
    table["split"] = "train"
    table.loc[hold_out(table, test_fraction, split_seed, "test"), "split"] = "test"
    found = Manifest(
        name=source.name,
        root=source.root,
        table=table[list(manifests.COLUMNS)],
        summary=summarise(source.root, rows, table, bad, test_fraction, split_seed),
    )
    manifests.write(found, out)
    return announced(found, source.why)


def announced(found: Manifest, why: str) -> Manifest:
    """Say in one line what was found and where, and hand it on."""
    counts = found.table["split"].value_counts()
    say(
        f"data: {found.name} ({why}): {len(found.table):,} images of"
        f" {len(found.class_names)} classes, {counts.get('test', 0):,} held out for test;"
        f" digest {found.dataset_digest}"
    )
    if dropped := len(found.summary["dropped"]):
        say(f"data: {dropped} rows dropped; dataset.json says which and why")
    return found


def read_rows(csv: Path) -> pd.DataFrame:
    """The CSV's columns filename and label as text, missing values as "".

    Raises:
        UserError: unreadable, a column missing, no row, or the same label in every row.
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
    return rows


def check_rows(rows: pd.DataFrame) -> tuple[pd.DataFrame, list[Bad]]:
    """The rows to open, and those that cannot even be looked for.

    Raises:
        UserError: a file name leads out of the folder: not a typing mistake, so not skipped.
    """
    bad: dict[int, Bad] = {}
    seen: set[str] = set()
    for index, (filename, label) in enumerate(zip(rows["filename"], rows["label"], strict=True)):
        # the Windows kind knows both slashes and drive letters
        path = PureWindowsPath(filename)
        if path.anchor or ".." in path.parts:
            raise UserError(
                f"row {index + 1} of {LABELS_FILE} names {filename!r}: paths must stay inside"
                f" the folder {IMAGES_FOLDER}/"
            )
        if not filename or not label:
            empty = "filename" if not filename else "label"
            bad[index] = Bad(index + 1, filename, f"the {empty} is empty")
        elif filename in seen:
            bad[index] = Bad(index + 1, filename, "listed twice; the first row counts")
        seen.add(filename)
    return rows.drop(index=list(bad)), list(bad.values())


def inspect_images(root: Path, rows: pd.DataFrame) -> tuple[pd.DataFrame, list[Bad]]:
    """Open and decode every image; facts of the good ones by row index, and the bad ones."""
    good: dict[int, dict[str, Any]] = {}
    bad: list[Bad] = []
    paths = [root / IMAGES_FOLDER / name for name in rows["filename"]]
    with ThreadPoolExecutor() as pool, progress("checking images", len(paths)) as advance:
        for index, path, found in zip(
            rows.index, paths, pool.map(inspect_image, paths), strict=True
        ):
            if isinstance(found, str):
                bad.append(Bad(int(index) + 1, rows["filename"][index], found))
            else:
                good[index] = {"path": path.relative_to(root).as_posix(), **found}
            advance(1)
    return pd.DataFrame.from_dict(good, orient="index"), bad


def inspect_image(path: Path) -> dict[str, Any] | str:
    """Size, digest and kind of one image file, or why it cannot be used."""
    try:
        if not path.is_file():
            return "no such file" if not path.exists() else "not a file"
        data = path.read_bytes()
        header = open_image(data)
        decode_rgb(data)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    except ImageError as error:
        return str(error)
    return {
        "width": header.width,
        "height": header.height,
        "bytes": len(data),
        "plain_jpeg": is_plain_jpeg(header),
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def check_bad_share(bad: list[Bad], total: int, csv: Path) -> None:
    """Raise a UserError that lists the bad rows when they are more than 2 % of `total`."""
    if len(bad) <= MAX_BAD_SHARE * total:
        return
    listed = "\n".join(f"  {each}" for each in bad[:20])
    more = f"\n  and {len(bad) - 20} more" if len(bad) > 20 else ""
    raise UserError(
        f"{len(bad)} of the {total} rows of {csv} cannot be used, more than"
        f" {MAX_BAD_SHARE:.0%}:\n{listed}{more}"
    )


def build_table(rows: pd.DataFrame, images: pd.DataFrame) -> pd.DataFrame:
    """Join labels to images; number labels and groups in order of first appearance."""
    # over all rows, as the notebooks' pd.factorize: a dropped first row shifts no label id
    names = [label for label in rows["label"].unique() if label]
    table = images.join(rows["label"]).reset_index(drop=True)
    table["label_id"] = table["label"].map({name: i for i, name in enumerate(names)})
    if lost := set(names) - set(table["label"]):
        raise UserError(f"too few images: none of {', '.join(sorted(lost))} can be read")
    table["duplicate_group"] = pd.factorize(table["sha256"])[0]
    return table


def summarise(
    root: Path,
    rows: pd.DataFrame,
    table: pd.DataFrame,
    bad: list[Bad],
    test_fraction: float,
    split_seed: int,
) -> dict[str, Any]:
    """What dataset.json tells beside the digests."""
    groups = table.groupby("duplicate_group")["label"].agg(["size", "nunique"])
    named = set(rows["filename"])
    folder = root / IMAGES_FOLDER
    files = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    strays = sorted(set(files) - named)
    return {
        "test_fraction": test_fraction,
        "split_seed": split_seed,
        "images": len(table),
        "images_by_split": dict(Counter(table["split"])),
        "images_by_label": dict(Counter(table["label"])),
        "duplicate_groups": int((groups["size"] > 1).sum()),
        "groups_with_conflicting_labels": int((groups["nunique"] > 1).sum()),
        "dropped": [vars(each) for each in bad],
        "strays": strays,
    }
