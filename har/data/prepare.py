"""From a folder of images to a checked manifest: every file opened, duplicates grouped,
test images held out.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pandas as pd

from har.data.duplicates import DUPLICATES, describe_groups, find_copies, perceptual_hash
from har.data.images import ImageError, is_plain_jpeg, open_image, read_image, to_rgb
from har.data.labels import build_bad_image, check_rows, find_test_file, read_labels
from har.data.manifest import COLUMNS, Manifest, read_manifest, write_manifest
from har.data.sources import LABELS_FILE, TEST_FOLDER, Source, find_source, is_image_name
from har.data.splits import Split, assign_splits
from har.data.summary import BadImage, DataSummary, Leak
from har.util.errors import UserError
from har.util.files import cache_folder, printable
from har.util.hardware import available_cpus
from har.util.progress import progress, say

# More bad rows than this share are a broken download, not a few broken files.
MAX_BAD_SHARE = 0.02
# Part of the cache's key: raise it when a manifest would come out different.
PREPARE_VERSION = 3
# Handing them out one by one takes a tenth of the time.
FILES_AT_ONCE = 16


def load_manifest(
    data: str,
    overrides: Mapping[str, Any] = {},
    default: Split = Split(),
    image_root: Path | None = None,
) -> Manifest:
    """The manifest for `--data`: a prepared folder is read; anything else is prepared into
    the cache, or taken from there if its files have not changed since.

    `overrides` are the fields of Split that the user asked for; `default` has the others.
    `image_root` is where the images of a prepared folder lie now, if they were moved.

    Raises:
        UserError: as `prepare` and `manifest.read`; or the folder was prepared with another
            split than the one asked for.
    """
    source = find_source(data)
    if source.layout == "prepared":
        found = read_manifest(source.root, image_root)
        _check_split(found, overrides)
        return _announce(found, source.why)
    if image_root is not None:
        raise UserError(
            f"--image-root says where the images of a prepared folder lie now; {source.root} is not"
            " prepared: give the images' folder as --data"
        )
    split = choose_split(overrides, default)
    kept = cache_folder() / "prepared" / _fingerprint(source, split)
    # a damaged entry of our own cache is no business of the user's: it is made again
    with suppress(UserError):
        return _announce(read_manifest(kept), source.why)
    return prepare(source, kept, split)


def choose_split(overrides: Mapping[str, Any], default: Split = Split()) -> Split:
    """`default` with what was overrides.

    Raises:
        UserError: a test fraction together with a test file.
    """
    split = replace(default, **overrides)
    if split.test_file == "none":
        return split
    if overrides.get("test_fraction"):
        raise UserError(
            f"--test-file {split.test_file} says which images are test: leave --test-fraction out"
        )
    return replace(split, test_fraction=0.0)


def _check_split(found: Manifest, overrides: Mapping[str, Any]) -> None:
    """Raise a UserError if a prepared folder was split in another way than asked for."""
    for name, value in overrides.items():
        prepared_with = getattr(found.summary.split, name)
        if value != prepared_with:
            raise UserError(
                f"the data was prepared with {name}={prepared_with}; received {value}."
                " Leave the option out, or prepare the images anew"
            )


def _fingerprint(source: Source, split: Split) -> str:
    """Changes when a file of the source does: by name, size and time, without reading images."""
    parts = [source.name, str(source.root), source.layout, str(PREPARE_VERSION), str(split)]
    files = [path for folder in source.image_folders for path in sorted(folder.rglob("*"))]
    if source.layout == "kaggle":
        files.append(source.root / LABELS_FILE)
    if split.test_file != "none":
        files.append(find_test_file(source, split.test_file))
    for path in files:
        with suppress(FileNotFoundError):  # gone since it was listed
            stat = path.lstat()
            parts.append(f"{path} {stat.st_size} {stat.st_mtime_ns}")
    return hashlib.sha256(os.fsencode("\n".join(parts))).hexdigest()[:16]


def prepare(source: Source, out: Path, split: Split = Split()) -> Manifest:
    """Check every labelled image, group duplicates, hold out test, write `out`.

    Raises:
        UserError: as `read_labels`; too few images, or more than 2 % of the rows without a
            readable image.
    """
    if source.layout == "prepared":
        raise UserError(
            f"{source.root} is prepared already: give the folder of its images, or say with"
            " --image-root where they lie now"
        )
    rows = read_labels(source, split.test_file)
    usable, bad = check_rows(rows)
    images, unreadable = _inspect_images(source.root, usable["path"])
    bad += [build_bad_image(rows.loc[index], reason) for index, reason in unreadable.items()]
    _check_bad_share(bad, len(rows), source.root)
    table = build_table(rows, images)
    table["duplicate_group"] = DUPLICATES[split.duplicates](table)
    table["split"] = assign_splits(table, split)
    test_folder_images, leaks = _find_leaks(source, table)
    summary = DataSummary(
        split=split,
        **_count(table),
        test_folder_images=test_folder_images,
        leaks=leaks,
        dropped=tuple(sorted(bad, key=lambda b: (b.file, b.row))),
        strays=_find_strays(source, rows, split),
    )
    found = Manifest(
        name=source.name, root=source.root, table=table[list(COLUMNS)], summary=summary
    )
    write_manifest(found, out)
    return _announce(found, source.why)


def _announce(found: Manifest, why: str) -> Manifest:
    """Say in a few lines what was found and where, and hand it on."""
    counts, facts = found.table["split"].value_counts(), found.summary
    say(
        f"data: {found.name} ({why}): {len(found.table):,} images of"
        f" {len(found.class_names)} classes, {counts.get('test', 0):,} held out for test;"
        f" digest {found.dataset_digest}"
    )
    if facts.duplicate_groups:
        say(
            f"data: {facts.duplicate_groups} groups of copies kept together"
            f" ({facts.near_duplicate_groups} of them near), {facts.conflicting_groups} with"
            " conflicting labels"
        )
    if unused := counts.get("unused", 0):
        say(f"data: {unused} images unused: a test image has a copy in train, or another label")
    if dropped := len(facts.dropped):
        say(f"data: {dropped} rows dropped; dataset.json says which and why")
    return found


def _inspect_images(root: Path, paths: "pd.Series[str]") -> tuple[pd.DataFrame, dict[Any, str]]:
    """Open and decode every image; facts of the good ones, and why the others are bad, both by
    the index of `paths`.
    """
    good: dict[Any, dict[str, Any]] = {}
    bad: dict[Any, str] = {}
    # more threads than processors only wait for each other: half as fast with six on two
    with (
        ThreadPoolExecutor(available_cpus()) as pool,
        progress("checking images", len(paths)) as advance,
    ):
        files = [root / path for path in paths]
        parts = [
            files[start : start + FILES_AT_ONCE] for start in range(0, len(files), FILES_AT_ONCE)
        ]
        found = chain.from_iterable(pool.map(lambda part: [*map(_inspect_image, part)], parts))
        for (index, path), facts in zip(paths.items(), found, strict=True):
            if isinstance(facts, str):
                bad[index] = facts
            else:
                good[index] = {"path": path, **facts}
            advance(1)
    columns = ["path", "width", "height", "bytes", "plain_jpeg", "sha256", "perceptual_hash"]
    return pd.DataFrame.from_dict(good, orient="index", columns=columns), bad


def _inspect_image(path: Path) -> dict[str, Any] | str:
    """Size, digests and kind of one image file, or why it cannot be used."""
    try:
        data = read_image(path)
        image = open_image(data)
        # turning it upright takes the tag away that these look at
        facts = {"width": image.width, "height": image.height, "plain_jpeg": is_plain_jpeg(image)}
        image = to_rgb(image)
    except ImageError as error:
        return str(error)
    return {
        **facts,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "perceptual_hash": perceptual_hash(image),
    }


def _check_bad_share(bad: list[BadImage], total: int, root: Path) -> None:
    """Raise a UserError that lists the bad rows when they are more than 2 % of `total`."""
    if len(bad) <= MAX_BAD_SHARE * total:
        return
    listed = "\n".join(f"  {each}" for each in bad[:20])
    more = f"\n  and {len(bad) - 20} more" if len(bad) > 20 else ""
    raise UserError(
        f"{len(bad)} of the {total} labelled images of {root} cannot be used, more than"
        f" {MAX_BAD_SHARE:.0%}:\n{listed}{more}"
    )


def build_table(rows: pd.DataFrame, images: pd.DataFrame) -> pd.DataFrame:
    """Join labels to images; number labels in order of first appearance."""
    # over all rows, as the notebooks' pd.factorize: a dropped first row shifts no label id
    names = [label for label in rows["label"].unique() if label]
    table = images.join(rows[["part", "label"]]).reset_index(drop=True)
    table["label_id"] = table["label"].map({name: i for i, name in enumerate(names)})
    if lost := set(names) - set(table["label"]):
        raise UserError(f"too few images: none of {', '.join(sorted(lost))} can be read")
    return table


def _count(table: pd.DataFrame) -> dict[str, Any]:
    """Counts of images and of groups of copies."""
    groups = describe_groups(table).drop_duplicates("duplicate_group")
    return {
        "images": len(table),
        "images_by_split": dict(Counter(table["split"])),
        "images_by_label": dict(Counter(table["label"])),
        "duplicate_groups": len(groups),
        "near_duplicate_groups": int((groups["kind"] == "near").sum()),
        "largest_duplicate_group": int(table["duplicate_group"].value_counts().max()),
        "conflicting_groups": int(groups["conflicting"].sum()),
    }


def _find_leaks(source: Source, table: pd.DataFrame) -> tuple[int, tuple[Leak, ...]]:
    """Count the images in Kaggle's own test/ folder, and find those that are copies of training
    images.
    """
    folder = source.root / TEST_FOLDER
    if source.layout != "kaggle" or not folder.is_dir():
        return 0, ()
    files = [path for path in sorted(folder.rglob("*")) if is_image_name(path)]
    paths = pd.Series([path.relative_to(source.root).as_posix() for path in files], dtype=str)
    images, _ = _inspect_images(source.root, paths)
    pairs = find_copies(images, table[table["part"] == "train"])
    return len(images), tuple(Leak(*pair) for pair in pairs)


def _find_strays(source: Source, rows: pd.DataFrame, split: Split) -> tuple[str, ...]:
    """Files in the folders of labelled images that no label is for; the path from the root."""
    folders = source.image_folders
    if source.layout == "kaggle" and split.test_file == "none":
        # nobody labels those
        folders = [folder for folder in folders if folder.name != TEST_FOLDER]
    files = (path for folder in folders for path in folder.rglob("*") if path.is_file())
    named = set(rows["path"])
    found = {path.relative_to(source.root).as_posix() for path in files} - named
    return tuple(sorted(printable(name) for name in found))
