"""Copies share a group; groups that swallow much of the data are reported."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageOps

from har.data.duplicates import (
    DUPLICATES,
    describe_groups,
    describe_large_groups,
    find_copies,
    find_large_groups,
    group_near,
    has_copy,
)
from har.data.hashes import PLAIN, perceptual_hash
from tests.data.pictures import PLAIN_KINDS, draw_picture, draw_xray


def chain() -> pd.DataFrame:
    """Byte-identical 0 and 2, 1 near 2's twin 3 by looks alone; 4 alone."""
    image = draw_picture(1)
    looks = [image, image.resize((150, 110)), image, ImageOps.mirror(image), draw_picture(2)]
    return pd.DataFrame(
        {
            "sha256": ["a", "b", "a", "c", "d"],
            "perceptual_hash": [perceptual_hash(each) for each in looks],
            "label": ["x", "x", "x", "y", "z"],
            "split": "train",
            "path": list("01234"),
        }
    )


def test_groups_join_by_bytes_and_by_looks() -> None:
    table = chain()
    assert group_near(table).tolist() == [0, 0, 0, 0, 1]
    assert DUPLICATES["exact"](table).tolist() == [0, 1, 0, 2, 3]
    assert DUPLICATES["ignore"](table).tolist() == [0, 1, 2, 3, 4]


def test_groups_are_described_conflicting_ones_first() -> None:
    table = pd.concat([chain(), chain().iloc[[0, 2]]], ignore_index=True)
    table["duplicate_group"] = [1, 1, 1, 1, 2, 0, 0]
    found = describe_groups(table)
    assert found["conflicting"].tolist() == [True] * 4 + [False] * 2
    assert found["kind"].tolist() == ["near"] * 4 + ["exact"] * 2
    assert "4" not in found["path"].tolist()


def draw_table(draw: Callable[[np.random.Generator], Image.Image], count: int = 90) -> pd.DataFrame:
    """A table of different pictures of one kind, with three labels."""
    rng = np.random.default_rng(0)
    pictures = [draw(rng).convert("RGB") for _ in range(count)]
    table = pd.DataFrame(
        {
            "sha256": [str(hash(each.tobytes())) for each in pictures],
            "perceptual_hash": [perceptual_hash(each) for each in pictures],
            "label": [f"class {n % 3}" for n in range(count)],
            "path": [str(n) for n in range(count)],
        }
    )
    return table.drop_duplicates("sha256", ignore_index=True)


@pytest.mark.parametrize("kind", PLAIN_KINDS)
def test_different_plain_pictures_are_no_copies(kind: str) -> None:
    table = draw_table(PLAIN_KINDS[kind])
    assert np.bincount(group_near(table)).max() <= 3
    # but the same file twice is
    twice = pd.concat([table, table.iloc[:1]], ignore_index=True)
    assert group_near(twice)[-1] == group_near(twice)[0]


def test_a_group_that_swallows_the_data_is_described_with_the_way_out() -> None:
    table = draw_table(draw_xray)
    table["duplicate_group"] = group_near(table)
    largest = find_large_groups(table).iloc[0]
    assert (largest["kind"], largest["labels"]) == ("near", 3) and largest["images"] > 60
    assert f"{largest['images']} of the 90 images, with 3 labels" in describe_large_groups(table)
    assert "--duplicates exact" in describe_large_groups(table)
    table["duplicate_group"] = DUPLICATES["exact"](table)
    assert describe_large_groups(table) == ""


# sizes of groups of near copies, the labels in each, images without a copy; is it large?
SIZES = {
    "a clip of a tenth": ([10], 1, 90, False),
    "a clip of more": ([11], 1, 89, True),
    "a pair of two": ([2], 1, 0, False),
    "a few of three labels": ([5], 3, 200, True),
    "a few of two labels": ([5], 2, 200, False),
    "many pairs": ([2] * 50, 2, 0, False),
    "nothing": ([], 1, 30, False),
}


@pytest.mark.parametrize("case", SIZES)
def test_what_a_large_group_is(case: str) -> None:
    sizes, labels, alone, large = SIZES[case]
    groups = [n for n, size in enumerate(sizes) for _ in range(size)]
    table = pd.DataFrame({"duplicate_group": [*groups, *range(len(sizes), len(sizes) + alone)]})
    table["label"] = [f"class {n % labels}" for n in range(len(table))]
    table["sha256"] = [str(n) for n in range(len(table))]
    assert (not find_large_groups(table).empty) is large
    assert bool(describe_large_groups(table)) is large


def test_a_large_group_of_one_file_is_not_for_the_hashes() -> None:
    table = pd.DataFrame({"duplicate_group": 0, "label": list("abcabc"), "sha256": "same"})
    assert "byte-identical files. Keep one" in describe_large_groups(table)
    assert "--duplicates" not in describe_large_groups(table)


def test_each_image_has_one_best_copy() -> None:
    table = chain()
    among = pd.concat([table.iloc[[1, 2, 0]], table.iloc[[4]]], ignore_index=True)
    # 0 has an exact copy and near ones, 3 only near ones, 4 itself
    found = list(find_copies(table.iloc[[0, 3, 4]], among))
    assert found[0] == ("0", "2", "exact") and found[2] == ("4", "4", "exact")
    assert found[1][0] == "3" and found[1][1] in "012" and found[1][2] == "near"
    assert has_copy(table, among).tolist() == [True] * 5
    assert has_copy(table, table.iloc[[4]]).tolist() == [False] * 4 + [True]
    assert has_copy(table.iloc[:0], among).tolist() == [] == list(find_copies(table, among[:0]))


def test_plain_pictures_are_copies_by_their_bytes_only() -> None:
    table = chain().assign(perceptual_hash=PLAIN)
    assert group_near(table).tolist() == [0, 1, 0, 2, 3]
    assert list(find_copies(table[:2], table[2:])) == [("0", "2", "exact")]
    assert has_copy(table[:2], table[2:]).tolist() == [True, False]


def test_many_alike_images_have_one_copy_each() -> None:
    table = pd.concat([chain().iloc[[0]]] * 3000, ignore_index=True)
    table["sha256"] = [str(n) for n in range(3000)]
    assert len(list(find_copies(table, table))) == 3000
    assert len(set(group_near(table).tolist())) == 1
