"""From a folder of images to a checked manifest: copies grouped, test images held out."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from har.data.duplicates import (
    DUPLICATES,
    describe_groups,
    describe_large_groups,
    find_copies,
)
from har.data.folders import is_image
from har.data.inspection import inspect_images
from har.data.labels import (
    Labelled,
    build_bad_image,
    check_rows,
    find_test_file,
    read_labels,
)
from har.data.layouts import TEST_FOLDER, Source
from har.data.manifest import SUMMARY_FILE, Manifest, read_manifest, write_manifest
from har.data.sources import find_source
from har.data.splits import Split, assign_splits
from har.data.summary import BadImage, DataSummary, Leak
from har.data.table_files import COLUMNS
from har.util.errors import UserError
from har.util.files import cache_folder, digest_bytes, storable
from har.util.progress import say, warn

# More bad rows mean a broken download, not a few broken files: a share of all rows, or a few rows
# of a small data set, but at most a part of them.
MAX_BAD_SHARE = 0.02
MAX_BAD_FEW = 5
MAX_BAD_PART = 0.2
# Part of the cache key: increase it when the same files would give another manifest.
PREPARE_VERSION = 4
# Names shown on the terminal; dataset.json has all.
MAX_NAMED = 5


def load_manifest(
    data: str | Source,
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
        check_split(manifest, overrides)
        return _announce(manifest, source.why, source.root)
    if image_root is not None:
        raise UserError(
            f"--image-root is only for a prepared folder, and {source.root} is not prepared: give"
            " the images' folder as --data"
        )
    split = choose_split(overrides, default, source)
    cached = cache_folder() / "prepared" / _fingerprint(source, split)
    # prepare again if the cached folder is missing or damaged
    with suppress(UserError):
        return _announce(read_manifest(cached), source.why, cached)
    return prepare(source, cached, split)


def choose_split(overrides: Mapping[str, Any], default: Split, source: Source) -> Split:
    """Return `default` changed by `overrides`; the test fraction is 0 if a test file or a folder
    test/ says which images are for test.
    """
    split = replace(default, **overrides)
    if split.test_file == "none" and not source.has_test_folder:
        return split
    if overrides.get("test_fraction"):
        where = "the folder test/" if source.has_test_folder else f"--test-file {split.test_file}"
        raise UserError(f"{where} already lists the test images: leave --test-fraction out")
    return replace(split, test_fraction=0.0)


def check_split(manifest: Manifest, overrides: Mapping[str, Any]) -> None:
    """Raise a UserError if the data was prepared with other options of the split."""
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
    parts += [
        f"{path} {facts.st_size} {facts.st_mtime_ns}"
        for path, facts in source.listing.files.items()
    ]
    parts += [f"{path} {reason}" for path, reason in source.listing.refused.items()]
    for path in (source.table, _find_given_test_file(source, split)):
        if path:
            facts = path.stat()
            parts.append(f"{path} {facts.st_size} {facts.st_mtime_ns}")
    return digest_bytes(os.fsencode("\n".join(parts)))[:16]


def _find_given_test_file(source: Source, split: Split) -> Path | None:
    return None if split.test_file == "none" else find_test_file(source, split.test_file)


def prepare(source: Source, out: Path, split: Split = Split()) -> Manifest:
    """Check every labelled image, group copies, hold out the test images, and write `out`."""
    if source.layout == "prepared":
        raise UserError(
            f"{source.root} is prepared already: give the folder of its images as --data, or add"
            " --image-root DIR if you moved the images"
        )
    labelled = read_labels(source, split)
    rows = labelled.rows
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
        summary=_summarise(source, labelled, table, split, bad),
    )
    write_manifest(manifest, out)
    return _announce(manifest, source.why, out)


def _announce(manifest: Manifest, why: str, folder: Path) -> Manifest:
    """Print what was found and what was left out, and return the manifest in `folder`."""
    summary, counts = manifest.summary, manifest.table["split"].value_counts()
    say(
        f"data: {manifest.name} ({why}): {len(manifest.table):,} images of"
        f" {len(manifest.class_names)} classes, {counts.get('test', 0):,} held out for test;"
        f" digest {manifest.dataset_digest}"
    )
    for note in summary.notes:
        say(f"data: {note}")
    if summary.duplicate_groups:
        say(
            f"data: {summary.duplicate_groups} groups of copies, each kept on one side of a split;"
            f" {summary.near_duplicate_groups} with near copies, {summary.conflicting_groups} with"
            " conflicting labels"
        )
    if unused := counts.get("unused", 0):
        say(f"data: {unused} images unused: copies of test images, or with conflicting labels")
    if large := describe_large_groups(manifest.table):
        warn(large)
    if summary.blank:
        say(f"data: {_name_some('images of one colour, which are used', summary.blank)}")
    if missing := _find_untested(manifest):
        warn(f"the test split has no image of {_name_some('labels', missing)}")
    everything = f"{folder / SUMMARY_FILE} lists all"
    if summary.dropped:
        named = _name_some("images that cannot be used", [str(each) for each in summary.dropped])
        warn(f"left out: {named}; {everything}")
    if summary.strays:
        warn(f"left out: {_name_some('files without a label', summary.strays)}; {everything}")
    return manifest


def _find_untested(manifest: Manifest) -> list[str]:
    tested = set(manifest.rows("test")["label"])
    return [label for label in manifest.class_names if label not in tested] if tested else []


def _name_some(what: str, names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_NAMED:,} more" if len(names) > MAX_NAMED else ""
    return f"{len(names):,} {what}: {', '.join(names[:MAX_NAMED])}{more}"


def _check_bad_share(bad: list[BadImage], total: int, root: Path) -> None:
    few = min(MAX_BAD_FEW, MAX_BAD_PART * total)
    if len(bad) <= max(MAX_BAD_SHARE * total, few):
        return
    more = [f"  and {len(bad) - 20} more"] if len(bad) > 20 else []
    raise UserError(
        f"{len(bad)} of the {total} labelled images of {root} cannot be used, more than"
        f" {MAX_BAD_SHARE:.0%} and more than a few; repair or remove them:",
        *(f"  {each}" for each in bad[:20]),
        *more,
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
    source: Source, labelled: Labelled, table: pd.DataFrame, split: Split, bad: list[BadImage]
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
        strays=labelled.strays,
        blank=tuple(table.loc[table["blank"], "path"]),
        notes=labelled.notes,
    )


def _find_leaks(source: Source, table: pd.DataFrame) -> tuple[int, tuple[Leak, ...]]:
    """The number of images in Kaggle's own test/ folder, and those that copy training images."""
    inside = source.listing.below(TEST_FOLDER) if source.layout == "table" else []
    # a name that is not UTF-8 is in no table
    utf8 = [path for path in inside if storable(path) == path]
    files = [path for path in utf8 if is_image(source.root, path)]
    if not files:
        return 0, ()
    images, _ = inspect_images(source.root, pd.Series(files, dtype=str))
    pairs = find_copies(images, table[table["part"] == "train"])
    return len(images), tuple(Leak(*pair) for pair in pairs)
