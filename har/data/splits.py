"""Holding images out: stratified by label, never parting a duplicate group."""

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
    """How test images are held out, and what must not be parted doing it.

    `test_file` is a CSV of labelled test images, or "none"; with one, its images are test and
    no others.
    """

    test_fraction: float = 0.15
    split_seed: int = 0
    duplicates: Duplicates = "near"
    test_file: str = "none"

    @property
    def as_options(self) -> str:
        """As typed on the command line."""
        return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in vars(self).items())


def assign_splits(table: pd.DataFrame, split: Split) -> npt.NDArray[np.str_]:
    """train, test or unused for each row of `table` (columns label, duplicate_group, part).

    `part` is "test" for the images of a test file. What such an image has a copy of is not
    trained on, and a test image whose copies carry other labels is not evaluated on: unused.

    Raises:
        UserError: as `hold_out`.
    """
    given = table["part"] == "test"
    if split.test_file == "none":
        held_out = hold_out(table, split.test_fraction, split.split_seed, "test")
        return np.where(held_out, "test", "train")
    by_group = table["duplicate_group"]
    conflicting = table.groupby(by_group)["label"].transform("nunique") > 1
    leaking = given.groupby(by_group).transform("any") & ~given
    unused = (given & conflicting) | leaking
    return np.where(unused, "unused", np.where(given, "test", "train"))


def hold_out(
    table: pd.DataFrame, fraction: float, seed: int, purpose: str
) -> npt.NDArray[np.bool_]:
    """(rows,) True for the images held out of `table` (columns label, duplicate_group).

    Whole groups are drawn, `fraction` of each label's, by scikit-learn. A group whose
    images carry different labels is never held out: nothing could be evaluated on it.
    `fraction` 0 holds out nothing.

    Raises:
        UserError: too few images for that; `purpose` ("test", ...) names the split.
    """
    if not 0 <= fraction < 1:
        raise UserError(f"the {purpose} fraction must be from 0 to below 1; received {fraction}")
    if fraction == 0:
        return np.zeros(len(table), dtype=bool)
    by_group = table.groupby("duplicate_group")["label"]
    groups = by_group.first()[by_group.nunique() == 1]
    _check_enough(groups, fraction, table["label"].unique(), purpose)
    _, held_out = train_test_split(
        groups.index.to_numpy(), test_size=fraction, stratify=groups, random_state=seed
    )
    return table["duplicate_group"].isin(held_out).to_numpy()


def _check_enough(
    groups: pd.Series, fraction: float, labels: npt.NDArray[np.object_], purpose: str
) -> None:
    """Raise a UserError unless each side of the split can have an image of every label.

    `groups` is the label of every group that may be held out.
    """
    counts = groups.value_counts().reindex(labels, fill_value=0)
    if counts.min() < 2:
        raise UserError(
            f"too few images for a {purpose} split: every label needs 2 distinct images without"
            f" a copy under another label, but {counts.idxmin()!r} has {counts.min()}"
        )
    classes = len(counts)
    needed = int(np.ceil(classes / min(fraction, 1 - fraction)))
    if len(groups) < needed:
        raise UserError(
            f"too few images for a {purpose} fraction of {fraction}: {classes} labels need at"
            f" least {needed} distinct images; found {len(groups)}"
        )
