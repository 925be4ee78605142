"""Splits: images held out of each label by their content, with copies of one image on one side.

The same images get the same split whatever their paths, their order and the layout of their folder,
and added images hardly move the others.
"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from har.data.duplicates import describe_large_groups
from har.util.errors import UserError

Duplicates = Literal["near", "exact", "ignore"]
LabelSpelling = Literal["stop", "merge", "keep"]
DrawnBy = Literal["content", "scikit-learn"]


@dataclass(frozen=True, kw_only=True)
class Split:
    """Options that decide which images are for test, and which images and labels are the same."""

    test_fraction: float = 0.15  # 0 if the data says itself which images are for test
    split_seed: int = 0
    duplicates: Duplicates = "near"
    test_file: str = "none"  # or a CSV that lists the test images with their labels
    label_spelling: LabelSpelling = "stop"  # at labels that may be one label in two spellings
    # No option: "scikit-learn" only to repeat, resume and evaluate runs of older versions.
    drawn_by: DrawnBy = "content"

    @property
    def as_options(self) -> str:
        """The options of the command line that give this split."""
        options = {name: value for name, value in vars(self).items() if name != "drawn_by"}
        return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in options.items())


# Options that older versions did not know, with the values that stand for what those versions did.
BEFORE_OPTIONS: dict[str, Any] = {"label_spelling": "keep", "drawn_by": "scikit-learn"}


def assign_splits(table: pd.DataFrame, split: Split) -> npt.NDArray[np.str_]:
    """Return train, test or unused for each row of `table` (columns label, duplicate_group, sha256,
    part).

    `part` is "test" for images that the data itself says are for test: those of a test file, or of
    folders test/LABEL. Two kinds of images are then unused: copies of test images, which must not
    be trained on, and test images with copies under other labels.
    """
    listed = table["part"] == "test"
    if not listed.any():
        held_out = hold_out(table, split, split.test_fraction, "test")
        return np.where(held_out, "test", "train")
    by_group = table["duplicate_group"]
    conflicting = table.groupby(by_group)["label"].transform("nunique") > 1
    leaking = listed.groupby(by_group).transform("any") & ~listed
    unused = (listed & conflicting) | leaking
    if lost := sorted(set(table["label"]) - set(table.loc[~listed & ~unused, "label"])):
        copies = describe_large_groups(table)
        raise UserError(
            f"no training image is left of the labels {', '.join(lost)}: they are copies of test"
            f" images{f'. {copies}' if copies else ''}"
        )
    return np.where(unused, "unused", np.where(listed, "test", "train"))


def hold_out(
    table: pd.DataFrame, split: Split, fraction: float, purpose: str
) -> npt.NDArray[np.bool_]:
    """Return (rows,) True for the images to hold out of `table` (columns label, duplicate_group,
    sha256).

    `fraction` is the share of the images of each label, as near as whole groups allow. A group
    with different labels is never held out, because no prediction for it would be right.
    `purpose` ("test" or "validation") names the split in error messages, and draws other images.
    """
    if not 0 <= fraction < 1:
        raise UserError(f"the {purpose} fraction must be from 0 to below 1; received {fraction}")
    if fraction == 0:
        return np.zeros(len(table), dtype=bool)
    groups = _find_eligible_groups(table)
    _check_enough(table, groups, fraction, purpose)
    drawn = DRAWS[split.drawn_by](groups, fraction, split.split_seed, purpose)
    return table["duplicate_group"].isin(drawn).to_numpy()


def _find_eligible_groups(table: pd.DataFrame) -> pd.DataFrame:
    """Return label, sha256 (the smallest in the group), images (in the group) and label_images (of
    the label in the whole table) for each group with one label.
    """
    facts = table[["duplicate_group", "label", "sha256"]]
    # most images have no copy: to group them takes seconds and much memory for a million
    alone = ~facts["duplicate_group"].duplicated(keep=False)
    single = facts[alone].set_index("duplicate_group").assign(images=1)
    by_group = facts[~alone].groupby("duplicate_group")
    several = by_group.agg(
        label=("label", "first"), sha256=("sha256", "min"), images=("label", "size")
    )
    groups = pd.concat([single, several[by_group["label"].nunique() == 1]]).sort_index()
    groups["label_images"] = groups["label"].map(table["label"].value_counts())
    return groups


def _check_enough(table: pd.DataFrame, groups: pd.DataFrame, fraction: float, purpose: str) -> None:
    labels = table["label"].unique()
    counts = groups["label"].value_counts().reindex(labels, fill_value=0)
    # copies are the usual reason
    copies = describe_large_groups(table)
    hint = f". {copies}" if copies else ""
    if counts.min() < 2:
        raise UserError(
            f"too few images for a {purpose} split: every label needs 2 distinct images without"
            f" a copy under another label, but {counts.idxmin()!r} has {counts.min()}; add images,"
            f" or use --{purpose}-fraction 0{hint}"
        )
    needed = int(np.ceil(len(labels) / min(fraction, 1 - fraction)))
    if len(groups) < needed:
        enough = np.ceil(100 * len(labels) / len(groups)) / 100
        hint += f"; add images, or use --{purpose}-fraction {enough:.2f}" if enough < 0.5 else ""
        raise UserError(
            f"too few images for a {purpose} fraction of {fraction}: {len(labels)} labels need at"
            f" least {needed} distinct images; found {len(groups)}{hint}"
        )


def _draw_by_content(groups: pd.DataFrame, fraction: float, seed: int, purpose: str) -> list[int]:
    """Draw the groups whose hashes come first in each label."""
    # with duplicates=ignore, copies are groups of their own and must not be drawn together
    repeats = groups.groupby("sha256").cumcount()
    hashes = [
        hashlib.sha256(f"{purpose} {seed} {content} {repeat}".encode()).hexdigest()
        # Python's own texts and integers: pandas' take a second for a million
        for content, repeat in zip(groups["sha256"].tolist(), repeats.tolist(), strict=True)
    ]
    # sorting copies every column
    ordered = groups.drop(columns="sha256").assign(hash=hashes).sort_values("hash")
    drawn: list[int] = []
    lacking = 0.0
    for _, of_label in ordered.drop(columns="hash").groupby("label"):
        # a label makes up for what the whole groups of the labels before it left over
        wanted = fraction * of_label["label_images"].iloc[0] + lacking
        chosen = _take(of_label["images"], wanted)
        lacking = wanted - of_label.loc[chosen, "images"].sum()
        drawn += chosen
    return drawn


def _take(sizes: "pd.Series[int]", wanted: float) -> list[Any]:
    """Return the keys of sizes that add up to about `wanted`: the first ones, without those that
    would lead away from it; at least one key, and not all.
    """
    chosen: list[Any] = []
    total = 0
    for key, size in sizes.items():
        nearer = abs(total + size - wanted) < abs(total - wanted)
        if nearer and len(chosen) + 1 < len(sizes):
            chosen.append(key)
            total += size
    return chosen or [(sizes - wanted).abs().idxmin()]


def _draw_by_scikit_learn(
    groups: pd.DataFrame, fraction: float, seed: int, purpose: str
) -> npt.NDArray[np.int64]:
    """Draw as the first versions did, which made splits depend on the order of the images."""
    # loads for a second, which a wrong --data would wait for
    from sklearn.model_selection import train_test_split

    _, drawn = train_test_split(
        groups.index.to_numpy(), test_size=fraction, stratify=groups["label"], random_state=seed
    )
    return drawn


DRAWS: dict[str, Callable[[pd.DataFrame, float, int, str], Iterable[int]]] = {
    "content": _draw_by_content,
    "scikit-learn": _draw_by_scikit_learn,
}
