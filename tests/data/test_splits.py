"""Held-out images: stratified, grouped, repeatable."""

import numpy as np
import pandas as pd
import pytest

from har.data.splits import Split, assign_splits, hold_out
from har.util.errors import UserError


def table(classes: int = 5, per_class: int = 40) -> pd.DataFrame:
    labels = np.repeat([f"c{i}" for i in range(classes)], per_class)
    return pd.DataFrame({"label": labels, "duplicate_group": np.arange(len(labels))})


@pytest.mark.parametrize("fraction", [0.1, 0.15, 0.25, 0.5])
def test_size_and_stratification(fraction: float) -> None:
    rows = table()
    held_out = rows[hold_out(rows, fraction, 0, "test")]
    assert len(held_out) == pytest.approx(fraction * len(rows), abs=1)
    assert held_out["label"].value_counts().min() == pytest.approx(fraction * 40, abs=1)


def test_groups_stay_together() -> None:
    rows = table()
    rows["duplicate_group"] //= 3  # groups of three; those across two labels conflict
    held_out = hold_out(rows, 0.3, 0, "test")
    assert rows.assign(held=held_out).groupby("duplicate_group")["held"].nunique().max() == 1
    conflicting = rows.groupby("duplicate_group")["label"].transform("nunique") > 1
    assert conflicting.any() and not held_out[conflicting].any()
    assert held_out.any()


def test_seed_decides() -> None:
    rows = table()
    first, again, other = (hold_out(rows, 0.2, seed, "test") for seed in (1, 1, 2))
    assert (first == again).all() and (first != other).any()


def test_zero_holds_nothing_out() -> None:
    assert not hold_out(table(), 0, 0, "test").any()


def test_a_lonely_label_is_named() -> None:
    rows = pd.concat([table(), pd.DataFrame({"label": ["odd"], "duplicate_group": [999]})])
    with pytest.raises(UserError, match=r"too few images for a test split: .*'odd' has 1"):
        hold_out(rows.reset_index(drop=True), 0.2, 0, "test")


@pytest.mark.parametrize("copied", [["c0"], ["c0", "c1"]])
def test_a_label_of_nothing_but_other_labels_copies_is_named(copied: list[str]) -> None:
    rows = table(classes=2)
    copies = rows[rows["label"].isin(copied)]
    rows = pd.concat([rows, copies.assign(label=copies["label"] + " too")], ignore_index=True)
    with pytest.raises(UserError, match=r"without a copy under another label, but 'c0' has 0"):
        hold_out(rows, 0.2, 0, "test")


def test_too_few_images_says_how_many_are_needed() -> None:
    with pytest.raises(UserError, match="5 labels need at least 50 distinct images; found 10"):
        hold_out(table(per_class=2), 0.1, 0, "validation")


def test_without_a_test_file_the_fraction_is_held_out() -> None:
    rows = table().assign(part="train")
    found = assign_splits(rows, Split(test_fraction=0.2))
    assert (found == np.where(hold_out(rows, 0.2, 0, "test"), "test", "train")).all()


def test_a_test_file_decides_and_copies_in_train_are_unused() -> None:
    rows = pd.DataFrame(
        {
            "part": ["train", "test", "train", "test", "train", "test"],
            "label": ["x", "x", "y", "z", "y", "x"],
            "duplicate_group": [0, 0, 1, 1, 2, 3],
        }
    )
    found = assign_splits(rows, Split(test_file="Testing_set.csv"))
    assert found.tolist() == ["unused", "test", "unused", "unused", "train", "test"]


def test_a_split_as_options() -> None:
    split = Split(test_fraction=0.2, duplicates="exact")
    assert split.as_options == (
        "--test-fraction 0.2 --split-seed 0 --duplicates exact --test-file none"
    )
