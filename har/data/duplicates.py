"""Copies of one image: byte-identical files, and images that look alike (see `har.data.alike`)."""

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import pandas as pd

from har.data.alike import find_closest, group_alike

Ints = npt.NDArray[np.int64]
# A group is large if it has so many images, and either so many labels or more than a share of all
# images. Near copies of such a group may have no more in common than a background.
LARGE_GROUP = 5
MANY_LABELS = 3
LARGE_SHARE = 0.1


def group_near(table: pd.DataFrame) -> Ints:
    """Group images with equal bytes or similar looks; a chain of copies is one group."""
    exact = group_exact(table)
    # compare one image of each set of byte-identical files
    firsts = np.unique(exact, return_index=True)[1]
    hashes = table["perceptual_hash"].to_numpy()[firsts].tolist()
    return _renumber(group_alike(hashes)[exact])


def group_exact(table: pd.DataFrame) -> Ints:
    """Group images with equal bytes."""
    return _renumber(table["sha256"].to_numpy())


def _renumber(groups: npt.NDArray[np.generic]) -> Ints:
    """Integers from 0, in order of first appearance."""
    return pd.factorize(groups)[0].astype(np.int64)


# Functions from a table (columns sha256, perceptual_hash) to (images,) group numbers.
DUPLICATES: dict[str, Callable[[pd.DataFrame], Ints]] = {
    "near": group_near,
    "exact": group_exact,
    "ignore": lambda table: np.arange(len(table)),
}


def describe_groups(table: pd.DataFrame) -> pd.DataFrame:
    """Return one row for each image that has a copy, groups with different labels first.

    The columns are duplicate_group, kind (exact or near), conflicting (True if the labels in the
    group differ), label, split, path.
    """
    # groups of one image, of which a large data set has a million, would take seconds
    copies = table[table["duplicate_group"].duplicated(keep=False)]
    by_group = copies.groupby("duplicate_group")
    facts = copies.assign(
        kind=np.where(by_group["sha256"].transform("nunique") > 1, "near", "exact"),
        conflicting=by_group["label"].transform("nunique") > 1,
    )
    columns = ["duplicate_group", "kind", "conflicting", "label", "split", "path"]
    ordered = facts.sort_values(
        ["conflicting", "duplicate_group"], ascending=[False, True], kind="stable"
    )
    return ordered[columns].reset_index(drop=True)


def find_large_groups(table: pd.DataFrame) -> pd.DataFrame:
    """Return one row for each group that swallows many labels or much of the data, largest first.

    The columns are duplicate_group, kind (exact or near), images, labels (their number).
    """
    images = table["duplicate_group"].value_counts()
    large = images.index[images >= LARGE_GROUP]
    by_group = table[table["duplicate_group"].isin(large)].groupby("duplicate_group")
    sizes, labels = by_group.size(), by_group["label"].nunique()
    kinds = np.where(by_group["sha256"].nunique() > 1, "near", "exact")
    facts = pd.DataFrame({"kind": kinds, "images": sizes, "labels": labels})
    swallows = (labels >= MANY_LABELS) | (sizes > LARGE_SHARE * len(table))
    found = facts[swallows].sort_values("images", ascending=False, kind="stable")
    return found.reset_index()


def describe_large_groups(table: pd.DataFrame) -> str:
    """Describe the largest group of `find_large_groups` and the way out, in one line; or "".

    The table has the columns path, sha256, label and duplicate_group.
    """
    found = find_large_groups(table)
    if found.empty:
        return ""
    largest = found.iloc[0]
    labels = f"{largest['labels']} labels" if largest["labels"] > 1 else "one label"
    held = f"{largest['images']:,} of the {len(table):,} images, with {labels}, are one group of"
    others = len(found) - 1
    more = f", and {others} more such group{'s' if others > 1 else ''}" if others else ""
    if largest["kind"] == "exact":
        return f"{held} byte-identical files{more}. Keep one file of each picture"
    return (
        f"{held} near copies{more}. Different pictures that are built alike can look like copies:"
        " if these are no copies, add --duplicates exact"
    )


def find_copies(images: pd.DataFrame, among: pd.DataFrame) -> Iterator[tuple[str, str, str]]:
    """Yield (path in `images`, path in `among`, "exact" or "near") for each image with a copy.

    An exact copy comes before near ones, and the closest near one before others. Both tables have
    the columns path, sha256 and perceptual_hash.
    """
    copies, is_exact = _find_best(images, among)
    for at in np.flatnonzero(copies >= 0):
        kind = "exact" if is_exact[at] else "near"
        yield images["path"].iloc[at], among["path"].iloc[copies[at]], kind


def has_copy(images: pd.DataFrame, among: pd.DataFrame) -> npt.NDArray[np.bool_]:
    """Return (images,) True for each image that has a copy, exact or near, in `among`."""
    return _find_best(images, among)[0] >= 0


def _find_best(images: pd.DataFrame, among: pd.DataFrame) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """Positions in `among` of each image's best copy, or -1; True where the copy is exact."""
    first = pd.Series(range(len(among)), index=among["sha256"])
    first = first[~first.index.duplicated()]
    best = images["sha256"].map(first).fillna(-1).to_numpy().astype(np.int64)
    is_exact = best >= 0
    others = images["perceptual_hash"].to_numpy()[~is_exact].tolist()
    best[~is_exact] = find_closest(others, among["perceptual_hash"].tolist())
    return best, is_exact
