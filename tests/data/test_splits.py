"""Held-out images: stratified, grouped, repeatable."""

import hashlib

import numpy as np
import pandas as pd
import pytest
from sklearn.model_selection import train_test_split

from har.data.splits import Split, assign_splits, hold_out
from har.util.errors import UserError


def table(classes: int = 5, per_class: int = 40) -> pd.DataFrame:
    labels = np.repeat([f"c{i}" for i in range(classes)], per_class)
    rows = pd.DataFrame({"label": labels, "duplicate_group": np.arange(len(labels))})
    return with_content(rows)


def with_content(rows: pd.DataFrame, start: int = 0) -> pd.DataFrame:
    """Each row another image."""
    contents = [hashlib.sha256(str(start + i).encode()).hexdigest() for i in range(len(rows))]
    return rows.assign(sha256=contents)


def held(rows: pd.DataFrame, fraction: float, seed: int = 0, purpose: str = "test") -> np.ndarray:
    return hold_out(rows, Split(split_seed=seed), fraction, purpose)


@pytest.mark.parametrize("fraction", [0.1, 0.15, 0.25, 0.5])
def test_size_and_stratification(fraction: float) -> None:
    rows = table()
    held_out = rows[held(rows, fraction, 0, "test")]
    assert len(held_out) == pytest.approx(fraction * len(rows), abs=1)
    assert held_out["label"].value_counts().min() == pytest.approx(fraction * 40, abs=1)


def test_groups_stay_together() -> None:
    rows = table()
    rows["duplicate_group"] //= 3  # groups of three; those across two labels conflict
    held_out = held(rows, 0.3, 0, "test")
    assert rows.assign(held=held_out).groupby("duplicate_group")["held"].nunique().max() == 1
    conflicting = rows.groupby("duplicate_group")["label"].transform("nunique") > 1
    assert conflicting.any() and not held_out[conflicting].any()
    assert held_out.any()


def test_seed_decides() -> None:
    rows = table()
    first, again, other = (held(rows, 0.2, seed, "test") for seed in (1, 1, 2))
    assert (first == again).all() and (first != other).any()


def test_zero_holds_nothing_out() -> None:
    assert not held(table(), 0, 0, "test").any()


def test_a_lonely_label_is_named() -> None:
    rows = pd.concat(
        [table(), pd.DataFrame({"label": ["odd"], "duplicate_group": [999], "sha256": ["f"]})]
    )
    with pytest.raises(UserError, match=r"too few images for a test split: .*'odd' has 1"):
        held(rows.reset_index(drop=True), 0.2)


@pytest.mark.parametrize("copied", [["c0"], ["c0", "c1"]])
def test_a_label_of_nothing_but_other_labels_copies_is_named(copied: list[str]) -> None:
    rows = table(classes=2)
    copies = rows[rows["label"].isin(copied)]
    rows = pd.concat([rows, copies.assign(label=copies["label"] + " too")], ignore_index=True)
    with pytest.raises(UserError, match=r"without a copy under another label, but 'c0' has 0"):
        held(rows, 0.2, 0, "test")


def test_too_few_images_says_how_many_are_needed() -> None:
    with pytest.raises(UserError, match="5 labels need at least 50 distinct images; found 10"):
        held(table(per_class=2), 0.1, 0, "validation")


def test_without_a_test_file_the_fraction_is_held_out() -> None:
    rows = table().assign(part="train")
    found = assign_splits(rows, Split(test_fraction=0.2))
    assert (found == np.where(held(rows, 0.2, 0, "test"), "test", "train")).all()


def test_a_test_file_decides_and_copies_in_train_are_unused() -> None:
    rows = pd.DataFrame(
        {
            "part": ["train", "test", "train", "test", "train", "test"],
            "label": ["x", "x", "y", "x", "y", "x"],
            "duplicate_group": [0, 0, 1, 1, 2, 3],
        }
    )
    rows = with_content(pd.concat([rows, rows.iloc[[0]].assign(duplicate_group=4)]))
    found = assign_splits(rows, Split(test_file="Testing_set.csv"))
    assert found.tolist() == ["unused", "test", "unused", "unused", "train", "test", "train"]
    with pytest.raises(UserError, match="no training image is left of the labels x: they are"):
        assign_splits(rows.iloc[:-1].reset_index(drop=True), Split(test_file="Testing_set.csv"))


def test_a_split_as_options() -> None:
    split = Split(test_fraction=0.2, duplicates="exact")
    assert split.as_options == (
        "--test-fraction 0.2 --split-seed 0 --duplicates exact --test-file none"
        " --label-spelling stop"
    )


def test_paths_order_and_group_numbers_do_not_matter() -> None:
    rows = table().assign(duplicate_group=lambda each: each["duplicate_group"] // 2)
    shuffled = rows.sample(frac=1, random_state=3).reset_index(drop=True)
    shuffled["duplicate_group"] = 1000 - shuffled["duplicate_group"]
    for purpose in ("test", "validation"):
        contents = [
            set(each.loc[held(each, 0.2, 0, purpose), "sha256"]) for each in (rows, shuffled)
        ]
        assert contents[0] == contents[1]


def test_added_images_hardly_move_the_others() -> None:
    rows = table(per_class=100)
    more = with_content(table(per_class=3), start=10_000)
    more["duplicate_group"] += 10_000
    both = pd.concat([rows, more], ignore_index=True)
    before, after = held(rows, 0.15), held(both, 0.15)[: len(rows)]
    assert (before != after).sum() <= 10


@pytest.mark.parametrize("seed", range(5))
def test_the_share_counts_images_however_large_the_groups_are(seed: int) -> None:
    sizes = np.random.default_rng(seed).integers(1, 60, 120)
    groups = np.repeat(np.arange(120), sizes)
    rows = with_content(
        pd.DataFrame({"label": [f"c{i % 4}" for i in groups], "duplicate_group": groups})
    )
    assert held(rows, 0.15, seed).mean() == pytest.approx(0.15, abs=0.01)


def test_a_group_larger_than_the_share_stays_in_training() -> None:
    groups = np.concatenate([np.zeros(70, int), np.arange(1, 31)])
    rows = with_content(pd.DataFrame({"label": "c", "duplicate_group": groups}))
    both = pd.concat([rows, table(1, 100).assign(duplicate_group=groups + 500)], ignore_index=True)
    both["sha256"] = with_content(both)["sha256"]
    both.loc[100:, "label"] = "d"
    for seed in range(10):
        assert not held(both, 0.2, seed)[:70].any()


def test_copies_that_count_as_images_are_drawn_apart() -> None:
    """duplicates=ignore splits copies freely, as the notebooks did."""
    rows = table(2, 200)
    rows["sha256"] = rows["sha256"].str.slice(0, 1).radd("same ")
    kept = held(rows, 0.5)
    assert rows.assign(held=kept).groupby("sha256")["held"].nunique().max() == 2


def test_older_splits_can_be_drawn_again() -> None:
    """By scikit-learn, as the first versions drew them."""
    rows = table()
    older = Split(drawn_by="scikit-learn", split_seed=1)
    _, expected = train_test_split(
        np.arange(200), test_size=0.2, stratify=rows["label"], random_state=1
    )
    assert np.flatnonzero(hold_out(rows, older, 0.2, "test")).tolist() == sorted(expected)
