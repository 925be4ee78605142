"""From a folder of images to a checked manifest: copies grouped, test images held out."""

import os
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from har.data.duplicates import DUPLICATES, describe_groups, find_copies
from har.data.inspection import inspect_images
from har.data.labels import build_bad_image, check_rows, find_test_file, read_labels
from har.data.manifest import COLUMNS, Manifest, read_manifest, write_manifest
from har.data.sources import LABELS_FILE, TEST_FOLDER, Source, find_source, is_image_name
from har.data.splits import Split, assign_splits
from har.data.summary import BadImage, DataSummary, Leak
from har.util.errors import UserError
from har.util.files import cache_folder, digest_bytes, printable
from har.util.progress import say

# A larger share of bad rows means a broken download, not a few broken files.
MAX_BAD_SHARE = 0.02
# Part of the cache key: increase it when the same files would give another manifest.
PREPARE_VERSION = 3


def load_manifest(
    data: str,
    overrides: Mapping[str, Any] = {},
    default: Split = Split(),
    image_root: Path | None = None,
) -> Manifest:
    """Return the manifest for `--data`: read a prepared folder; prepare anything else in the
    cache, or read it from there if its files have not changed.

    `overrides` are the fields of Split that the user gave; the others come from `default`.
    `image_root` is the new folder of the images of a prepared folder, if they were moved.
    """
    source = find_source(data)
    if source.layout == "prepared":
        manifest = read_manifest(source.root, image_root)
        _check_split(manifest, overrides)
        return _announce(manifest, source.why)
    if image_root is not None:
        raise UserError(
            f"--image-root is only for a prepared folder, and {source.root} is not prepared: give"
            " the images' folder as --data"
        )
    split = choose_split(overrides, default)
    cached = cache_folder() / "prepared" / _fingerprint(source, split)
    # prepare again if the cached folder is missing or damaged
    with suppress(UserError):
        return _announce(read_manifest(cached), source.why)
    return prepare(source, cached, split)


def choose_split(overrides: Mapping[str, Any], default: Split = Split()) -> Split:
    """Return `default` changed by `overrides`; a test file sets the test fraction to 0."""
    split = replace(default, **overrides)
    if split.test_file == "none":
        return split
    if overrides.get("test_fraction"):
        raise UserError(
            f"--test-file {split.test_file} already lists the test images: leave --test-fraction"
            " out"
        )
    return replace(split, test_fraction=0.0)


def _check_split(manifest: Manifest, overrides: Mapping[str, Any]) -> None:
    for name, value in overrides.items():
        prepared_with = getattr(manifest.summary.split, name)
        if value != prepared_with:
            raise UserError(
                f"the data was prepared with {name}={prepared_with}; received {value}. Leave"
                f" --{name.replace('_', '-')} out, or run `har prepare` again with it"
            )


def _fingerprint(source: Source, split: Split) -> str:
    """Digest of the names, sizes and times of the source's files; it reads no image."""
    parts = [source.name, str(source.root), source.layout, str(PREPARE_VERSION), str(split)]
    files = [path for folder in source.image_folders for path in sorted(folder.rglob("*"))]
    if source.layout == "kaggle":
        files.append(source.root / LABELS_FILE)
    if split.test_file != "none":
        files.append(find_test_file(source, split.test_file))
    for path in files:
        with suppress(FileNotFoundError):  # it was deleted after it was listed
            stat = path.lstat()
            parts.append(f"{path} {stat.st_size} {stat.st_mtime_ns}")
    return digest_bytes(os.fsencode("\n".join(parts)))[:16]


def prepare(source: Source, out: Path, split: Split = Split()) -> Manifest:
    """Check every labelled image, group copies, hold out the test images, and write `out`."""
    if source.layout == "prepared":
        raise UserError(
            f"{source.root} is prepared already: give the folder of its images as --data, or add"
            " --image-root DIR if you moved the images"
        )
    rows = read_labels(source, split.test_file)
    usable, bad = check_rows(rows)
    images, unreadable = inspect_images(source.root, usable["path"])
    bad += [build_bad_image(rows.loc[index], reason) for index, reason in unreadable.items()]
    _check_bad_share(bad, len(rows), source.root)
    table = build_table(rows, images)
    table["duplicate_group"] = DUPLICATES[split.duplicates](table)
    table["split"] = assign_splits(table, split)
    manifest = Manifest(
        name=source.name,
        root=source.root,
        table=table[list(COLUMNS)],
        summary=_summarise(source, rows, table, split, bad),
    )
    write_manifest(manifest, out)
    return _announce(manifest, source.why)


def _announce(manifest: Manifest, why: str) -> Manifest:
    """Print what was found, and return the manifest."""
    summary, counts = manifest.summary, manifest.table["split"].value_counts()
    say(
        f"data: {manifest.name} ({why}): {len(manifest.table):,} images of"
        f" {len(manifest.class_names)} classes, {counts.get('test', 0):,} held out for test;"
        f" digest {manifest.dataset_digest}"
    )
    if summary.duplicate_groups:
        say(
            f"data: {summary.duplicate_groups} groups of copies, each kept on one side of a split;"
            f" {summary.near_duplicate_groups} with near copies, {summary.conflicting_groups} with"
            " conflicting labels"
        )
    if unused := counts.get("unused", 0):
        say(f"data: {unused} images unused: copies of test images, or with conflicting labels")
    if summary.dropped:
        say(f"data: {len(summary.dropped)} images dropped; dataset.json lists them with reasons")
    return manifest


def _check_bad_share(bad: list[BadImage], total: int, root: Path) -> None:
    if len(bad) <= MAX_BAD_SHARE * total:
        return
    listed = "\n".join(f"  {each}" for each in bad[:20])
    more = f"\n  and {len(bad) - 20} more" if len(bad) > 20 else ""
    raise UserError(
        f"{len(bad)} of the {total} labelled images of {root} cannot be used, more than"
        f" {MAX_BAD_SHARE:.0%}; repair or remove them:\n{listed}{more}"
    )


def build_table(rows: pd.DataFrame, images: pd.DataFrame) -> pd.DataFrame:
    """Join labels to images; number labels in order of first appearance."""
    # from all rows, as the notebooks' pd.factorize: a bad first image shifts no label id
    names = [label for label in rows["label"].unique() if label]
    table = images.join(rows[["part", "label"]]).reset_index(drop=True)
    table["label_id"] = table["label"].map({name: i for i, name in enumerate(names)})
    if lost := set(names) - set(table["label"]):
        raise UserError(f"no image can be read of the labels {', '.join(sorted(lost))}")
    return table


def _summarise(
    source: Source, rows: pd.DataFrame, table: pd.DataFrame, split: Split, bad: list[BadImage]
) -> DataSummary:
    groups = describe_groups(table).drop_duplicates("duplicate_group")
    test_folder_images, leaks = _find_leaks(source, table)
    return DataSummary(
        split=split,
        images=len(table),
        images_by_split=dict(Counter(table["split"])),
        images_by_label=dict(Counter(table["label"])),
        duplicate_groups=len(groups),
        near_duplicate_groups=int((groups["kind"] == "near").sum()),
        largest_duplicate_group=int(table["duplicate_group"].value_counts().max()),
        conflicting_groups=int(groups["conflicting"].sum()),
        test_folder_images=test_folder_images,
        leaks=leaks,
        dropped=tuple(sorted(bad, key=lambda each: (each.file, each.row))),
        strays=_find_strays(source, rows, split),
    )


def _find_leaks(source: Source, table: pd.DataFrame) -> tuple[int, tuple[Leak, ...]]:
    """The number of images in Kaggle's own test/ folder, and those that copy training images."""
    folder = source.root / TEST_FOLDER
    if source.layout != "kaggle" or not folder.is_dir():
        return 0, ()
    files = [path for path in sorted(folder.rglob("*")) if is_image_name(path)]
    paths = pd.Series([path.relative_to(source.root).as_posix() for path in files], dtype=str)
    images, _ = inspect_images(source.root, paths)
    pairs = find_copies(images, table[table["part"] == "train"])
    return len(images), tuple(Leak(*pair) for pair in pairs)


def _find_strays(source: Source, rows: pd.DataFrame, split: Split) -> tuple[str, ...]:
    """Files without a label in the folders of labelled images."""
    folders = source.image_folders
    if source.layout == "kaggle" and split.test_file == "none":
        # Kaggle publishes no labels for test/
        folders = [folder for folder in folders if folder.name != TEST_FOLDER]
    files = (path for folder in folders for path in folder.rglob("*") if path.is_file())
    strays = {path.relative_to(source.root).as_posix() for path in files} - set(rows["path"])
    return tuple(sorted(printable(name) for name in strays))
