"""The facts about a data set, as dataset.json holds them."""

import json
from dataclasses import replace

import pytest

from har.data.splits import Split
from har.data.summary import BadImage, DataSummary, Leak

SUMMARY = DataSummary(
    split=Split(test_fraction=0.25, split_seed=3, duplicates="exact"),
    images=5,
    images_by_split={"train": 4, "test": 1},
    images_by_label={"sitting": 3, "running": 2},
    duplicate_groups=2,
    near_duplicate_groups=1,
    largest_duplicate_group=2,
    conflicting_groups=1,
    test_folder_images=1,
    leaks=(Leak("test/a.jpg", "train/b.jpg", "near"),),
    dropped=(BadImage("Training_set.csv", 7, "c.jpg", "no such file"),),
    strays=("train/d.txt",),
)
# The keys of dataset.json that other versions of this project read, in their order.
KEYS = [
    "test_fraction", "split_seed", "duplicates", "test_file", "label_spelling", "drawn_by",
    "images", "images_by_split", "images_by_label", "duplicate_groups",
    "near_duplicate_groups", "largest_duplicate_group", "conflicting_groups",
    "test_folder_images", "leaks", "dropped", "strays", "blank", "notes",
]  # fmt: skip

OLDEST = [*KEYS[:4], *KEYS[6:10]]


def test_json_keeps_its_keys_and_reads_back_equal() -> None:
    stored = json.loads(json.dumps(SUMMARY.to_json()))
    assert list(stored) == KEYS
    assert stored["leaks"] == [{"test": "test/a.jpg", "train": "train/b.jpg", "kind": "near"}]
    assert stored["dropped"] == [
        {"file": "Training_set.csv", "row": 7, "filename": "c.jpg", "reason": "no such file"}
    ]
    assert DataSummary.from_json(stored) == SUMMARY


def test_facts_that_an_older_version_did_not_store_have_defaults() -> None:
    stored = {key: value for key, value in SUMMARY.to_json().items() if key in OLDEST}
    found = DataSummary.from_json(stored | {"of_a_newer_version": 1})
    # the first versions drew by scikit-learn, and kept every spelling of a label
    older = replace(SUMMARY.split, label_spelling="keep", drawn_by="scikit-learn")
    assert (found.split, found.images) == (older, SUMMARY.images)
    assert found.leaks == found.dropped == found.strays == ()
    assert found.test_folder_images == 0 and found.largest_duplicate_group == 1


@pytest.mark.parametrize("name", ["split_seed", "images"])
def test_facts_that_every_version_stored_are_required(name: str) -> None:
    stored = SUMMARY.to_json()
    del stored[name]
    with pytest.raises((KeyError, TypeError), match=name):
        DataSummary.from_json(stored)
