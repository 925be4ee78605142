"""Splits: images held out stratified by label, with copies of one image on one side."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
from sklearn.model_selection import train_test_split

from har.util.errors import UserError

Duplicates = Literal["near", "exact", "ignore"]


@dataclass(frozen=True, kw_only=True)
class Split:
    """Options that decide which images are for test, and which images count as copies."""

    test_fraction: float = 0.15  # 0 with a test file
    split_seed: int = 0
    duplicates: Duplicates = "near"
    test_file: str = "none"  # or a CSV that lists the test images with their labels

    @property
    def as_options(self) -> str:
        """The options of the command line that give this split."""
        return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in vars(self).items())


def assign_splits(table: pd.DataFrame, split: Split) -> npt.NDArray[np.str_]:
    """Return train, test or unused for each row of `table` (columns label, duplicate_group, part).

    `part` is "test" for the images of a test file. Two kinds of images are then unused: copies
    of test images, which must not be trained on, and test images with copies under other labels.
    """
    if split.test_file == "none":
        held_out = hold_out(table, split.test_fraction, split.split_seed, "test")
        return np.where(held_out, "test", "train")
    listed = table["part"] == "test"
    by_group = table["duplicate_group"]
    conflicting = table.groupby(by_group)["label"].transform("nunique") > 1
    leaking = listed.groupby(by_group).transform("any") & ~listed
    unused = (listed & conflicting) | leaking
    return np.where(unused, "unused", np.where(listed, "test", "train"))


def hold_out(
    table: pd.DataFrame, fraction: float, seed: int, purpose: str
) -> npt.NDArray[np.bool_]:
    """Return (rows,) True for the images to hold out of `table` (columns label, duplicate_group).

    scikit-learn draws `fraction` of the groups of each label, and a group moves as a whole. A
    group with different labels is never held out, because no prediction for it would be right.
    `purpose` ("test" or "validation") names the split in error messages.
    """
    if not 0 <= fraction < 1:
        raise UserError(f"the {purpose} fraction must be from 0 to below 1; received {fraction}")
    if fraction == 0:
        return np.zeros(len(table), dtype=bool)
    by_group = table.groupby("duplicate_group")["label"]
    groups = by_group.first()[by_group.nunique() == 1]
    counts = groups.value_counts().reindex(table["label"].unique(), fill_value=0)
    if counts.min() < 2:
        raise UserError(
            f"too few images for a {purpose} split: every label needs 2 distinct images without"
            f" a copy under another label, but {counts.idxmin()!r} has {counts.min()}; add images,"
            f" or use --{purpose}-fraction 0"
        )
    classes = len(counts)
    needed = int(np.ceil(classes / min(fraction, 1 - fraction)))
    if len(groups) < needed:
        raise UserError(
            f"too few images for a {purpose} fraction of {fraction}: {classes} labels need at"
            f" least {needed} distinct images; found {len(groups)}"
        )
    _, held_out = train_test_split(
        groups.index.to_numpy(), test_size=fraction, stratify=groups, random_state=seed
    )
    return table["duplicate_group"].isin(held_out).to_numpy()
