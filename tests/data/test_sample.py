"""The drawn sample: same bytes for the same seed, in the layout of the Kaggle data."""

import csv
import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from har.data.sample import (
    ACTIONS,
    TABLES,
    draw_action,
    find_joints,
    mix_inks,
    prop_shapes,
    write_sample,
)

LABELS = [
    "calling",
    "clapping",
    "cycling",
    "dancing",
    "drinking",
    "eating",
    "fighting",
    "hugging",
    "laughing",
    "listening_to_music",
    "running",
    "sitting",
    "sleeping",
    "texting",
    "using_laptop",
]


SCENES = [scene for scenes in ACTIONS.values() for scene in scenes]


PEOPLE = [person for scene in SCENES for person in scene["people"]]


FULL_PEOPLE = [TABLES["person_defaults"] | person for person in ({}, *PEOPLE)]


THINGS = {name for place in TABLES["places"].values() for name in place["things"]}


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def rows(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sample(tmp_path_factory.mktemp("sample"), per_class=3, test_images=4)


def test_same_seed_gives_same_bytes(tmp_path: Path, sample: Path) -> None:
    assert contents(write_sample(tmp_path / "new" / "again", 3, 4)) == contents(sample)


def test_other_seed_gives_other_pictures(tmp_path: Path, sample: Path) -> None:
    other = contents(write_sample(tmp_path, 2, 4, seed=1))
    same = contents(sample)
    assert all(other[name] != same[name] for name in other if name.endswith(".jpg"))


def test_a_picture_does_not_depend_on_how_many_are_drawn(tmp_path: Path, sample: Path) -> None:
    fewer, more = contents(write_sample(tmp_path, 2, 2)), contents(sample)
    assert all(more[name] == data for name, data in fewer.items() if name.endswith(".jpg"))


def test_the_actions_are_the_fifteen() -> None:
    assert list(ACTIONS) == LABELS


def test_every_action_draws_within_the_stated_size() -> None:
    for action, seed in itertools.product(ACTIONS, range(6)):
        picture = draw_action(action, np.random.default_rng(seed))
        assert picture.mode == "RGB"
        assert 84 <= picture.width <= 478 and 84 <= picture.height <= 318
        assert np.asarray(picture).std() > 10


def test_scenes_and_people_say_only_what_is_understood() -> None:
    for scene in SCENES:
        assert set(scene) <= {"people", *TABLES["scene_defaults"]}
        assert scene["people"]
    assert all(set(person) <= set(TABLES["person_defaults"]) for person in PEOPLE)


def test_scenes_name_what_the_tables_hold_and_leave_nothing_unused() -> None:
    body = {"right_leg", "left_leg", "right_arm", "left_arm", "torso", "head"}
    hair = {f"hair_{name}{part}" for name in TABLES["hair"] for part in ("", "_behind")}
    props = body | hair | THINGS
    for scene in SCENES:
        props |= {name for key in ("behind", "front", "sometimes") for name in scene.get(key, [])}
    props |= {name for person in FULL_PEOPLE for name in person["face"]}
    assert props == set(TABLES["props"])
    for key in ("arms", "legs"):
        assert {person[key] for person in FULL_PEOPLE} == set(TABLES[key])
    full_scenes = [TABLES["scene_defaults"] | scene for scene in SCENES]
    assert {scene["view"] for scene in full_scenes} == set(TABLES["views"])
    assert {name for scene in full_scenes for name in scene["places"]} == set(TABLES["places"])


def test_every_prop_can_be_drawn() -> None:
    rng = np.random.default_rng(0)
    figure = find_joints(TABLES["person_defaults"], rng)
    for name in TABLES["props"]:
        joints = {"spot": figure["hip"]} if name in THINGS else figure
        outlines = [outline for outline, _ in prop_shapes(name, joints, mix_inks(rng))]
        assert outlines and np.isfinite(np.concatenate(outlines)).all(), name
        assert min(len(outline) for outline in outlines) > 2, name


def test_places_name_known_inks() -> None:
    inks = mix_inks(np.random.default_rng(0))
    for place in TABLES["places"].values():
        assert {place["backdrop"], place["backdrop"] + "-"} <= set(inks)
        assert place.get("ground", "dark") in inks


def test_layout_and_labels(sample: Path) -> None:
    header, *train = rows(sample / "Training_set.csv")
    assert header == ["filename", "label"]
    assert Counter(label for _, label in train) == dict.fromkeys(LABELS, 3)
    assert [label for _, label in train] != sorted(label for _, label in train)
    assert {name for name, _ in train} == {path.name for path in (sample / "train").iterdir()}
    assert train[0][0] == "Image_1.jpg"
    with Image.open(sample / "train" / "Image_1.jpg") as picture:
        assert (picture.format, picture.mode) == ("JPEG", "RGB")


def test_test_images_are_unlabelled(sample: Path) -> None:
    names = [f"Image_{i}.jpg" for i in range(1, 5)]
    assert rows(sample / "Testing_set.csv") == [["filename"], *([name] for name in names)]
    assert sorted(path.name for path in (sample / "test").iterdir()) == names


def test_progress_counts_every_picture(tmp_path: Path) -> None:
    steps: list[int] = []
    write_sample(tmp_path, 2, 3, progress=steps.append)
    assert steps == [1] * (2 * len(ACTIONS) + 3)


@pytest.mark.parametrize(("per_class", "test_images"), [(1, 60), (-7, 60), (2, -5)])
def test_bad_counts_are_refused_by_value(tmp_path: Path, per_class: int, test_images: int) -> None:
    with pytest.raises(ValueError, match=str(min(per_class, test_images))):
        write_sample(tmp_path / "none", per_class, test_images)
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_a_frozen_backbone_does_clearly_better_than_chance() -> None:
    """Chance is 1 in 15; the bar is three times that, from 8 pictures an action."""
    from sklearn.neighbors import NearestCentroid

    from har.data.images import resize_bicubic
    from har.models.efficientnet_lite import build_imagenet_lite

    size, per_class = 96, 12
    pictures = [
        resize_bicubic(np.asarray(draw_action(action, np.random.default_rng([7, i, k]))), size)
        for i in range(per_class)
        for k, action in enumerate(ACTIONS)
    ]
    labels = np.tile(np.arange(len(ACTIONS)), per_class)
    features = build_imagenet_lite("efficientnet-lite0", size).predict(
        np.stack(pictures), verbose=0
    )
    learnt, held_out = slice(0, 8 * len(ACTIONS)), slice(8 * len(ACTIONS), None)
    head = NearestCentroid().fit(features[learnt], labels[learnt])
    assert head.score(features[held_out], labels[held_out]) > 3 / len(ACTIONS)
