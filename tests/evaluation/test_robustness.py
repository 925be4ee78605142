"""Perturbations and the accuracy under them."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from har.data.images import Pixels
from har.data.manifest import Manifest
from har.evaluation import robustness
from har.evaluation.evaluate import evaluate
from har.evaluation.metrics import paired_difference, wilson_interval
from har.evaluation.robustness import (
    PERTURBATIONS,
    format_table,
    measure_perturbations,
    measure_robustness,
    pick_evenly,
    shift,
)
from har.inference.classifier import Classifier, load_classifier, save_classifier
from har.inference.runtimes import Forward
from har.models.build import build_model
from har.util.errors import UserError
from tests.fixtures import TINY_SIZE, tiny_recipe

IMAGES = np.random.default_rng(0).integers(0, 256, (4, 40, 40, 3)).astype(np.uint8)


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_perturbations_keep_shape_and_are_pure(name: str) -> None:
    before = IMAGES.copy()
    after = PERTURBATIONS[name](IMAGES)
    assert after.shape == IMAGES.shape
    assert after.dtype == np.uint8
    np.testing.assert_array_equal(IMAGES, before)
    np.testing.assert_array_equal(after, PERTURBATIONS[name](IMAGES))
    # each image by itself, whatever the batch
    np.testing.assert_array_equal(after[2:3], PERTURBATIONS[name](IMAGES[2:3]))
    assert np.array_equal(after, IMAGES) == (name == "none")


def test_flipped_twice_is_as_before() -> None:
    flip = PERTURBATIONS["flip_left_right"]
    np.testing.assert_array_equal(flip(flip(IMAGES)), IMAGES)
    np.testing.assert_array_equal(flip(IMAGES)[:, :, 0], IMAGES[:, :, -1])


@pytest.mark.parametrize(("name", "by"), [("shift_2.5_percent", 1), ("shift_5_percent", 2)])
def test_shift_moves_every_pixel_and_repeats_the_edge(name: str, by: int) -> None:
    after = PERTURBATIONS[name](IMAGES)
    np.testing.assert_array_equal(after[:, by:, by:], IMAGES[:, :-by, :-by])
    np.testing.assert_array_equal(after[:, by:, 0], IMAGES[:, :-by, 0])
    np.testing.assert_array_equal(after[:, 0, 0], IMAGES[:, 0, 0])


def test_shift_is_a_share_of_the_side_but_a_pixel_at_least() -> None:
    images = np.zeros((1, 160, 160, 3), np.uint8)
    images[0, 10, 20] = 255
    assert np.argwhere(shift(images, 0.05)[0, ..., 0]).tolist() == [[18, 28]]
    small = images[:, 5:15, 15:25]
    assert np.argwhere(shift(small, 0.025)[0, ..., 0]).tolist() == [[6, 6]]


def smooth() -> Pixels:
    """A picture that JPEG and blur can keep: a ramp and a soft disc."""
    y, x = np.mgrid[:96, :96]
    disc = 80 * np.exp(-((x - 48) ** 2 + (y - 48) ** 2) / 400)
    return np.stack([x + disc, y + disc, 128 - disc], axis=-1).astype(np.uint8)[None]


def distance(name: str, images: Pixels) -> float:
    return float(np.abs(PERTURBATIONS[name](images).astype(int) - images).mean())


def test_a_worse_quality_changes_more_but_keeps_the_picture() -> None:
    assert 0 < distance("jpeg_quality_50", smooth()) < distance("jpeg_quality_20", smooth()) < 8


def test_blur_widens_a_point_by_its_radius() -> None:
    point = np.zeros((1, 41, 41, 3), np.uint8)
    point[0, 18:23, 18:23] = 255
    for name, pixels in (("blur_1px", 1), ("blur_2px", 2)):
        after = PERTURBATIONS[name](point)[0, ..., 0].astype(float)
        across = after.sum(axis=0) / after.sum()
        variance = across @ (np.arange(41) - 20) ** 2
        # of the square itself, (5 * 5 - 1) / 12, and of the Gaussian
        assert variance == pytest.approx(2 + pixels**2, rel=0.1)


def as_classifier(forward: Callable[[Pixels], np.ndarray]) -> Classifier:
    return Classifier(
        forward=Forward(run=lambda images: forward(np.asarray(images))),
        class_names=("left", "right"),
        recipe=tiny_recipe(),
        runtime="tensorflow",
    )


def brighter_side(images: Pixels) -> np.ndarray:
    """Class 1 where the right half is the brighter one: a flip turns it around."""
    middle = images.shape[2] // 2
    left, right = images[:, :, :middle].mean((1, 2, 3)), images[:, :, middle:].mean((1, 2, 3))
    return np.stack([left >= right, left < right], axis=1)


def halves(bright_right: list[bool]) -> Pixels:
    images = np.full((len(bright_right), 40, 40, 3), 50, np.uint8)
    for image, right in zip(images, bright_right, strict=True):
        image[:, 20 if right else 0 : 40 if right else 20] = 200
    return images


def test_measured_by_hand() -> None:
    images = halves([True, True, False, False, False])
    label_ids = np.array([1, 1, 1, 0, 0])  # the third is mistaken
    batches = iter([images[:2], images[2:]])  # can be read only once
    table = measure_perturbations(as_classifier(brighter_side), batches, label_ids).set_index(
        "perturbation"
    )
    assert list(table.index) == list(PERTURBATIONS)
    assert (table["images"] == 5).all()
    plain, flipped = table.loc["none"], table.loc["flip_left_right"]
    assert plain["accuracy"] == 0.8
    assert (plain["accuracy_low"], plain["accuracy_high"]) == wilson_interval(4, 5)
    assert plain[["difference", "difference_low", "difference_high"]].tolist() == [0, 0, 0]
    assert plain["same_label"] == 1
    assert flipped["accuracy"] == 0.2
    assert flipped["same_label"] == 0
    hits = np.array([True, True, False, True, True])
    expected = paired_difference(hits, ~hits)
    assert tuple(flipped[["difference", "difference_low", "difference_high"]]) == expected
    assert expected[0] == pytest.approx(-0.6)
    for name in set(table.index) - {"none", "flip_left_right"}:
        assert table.loc[name, "same_label"] == 1
        assert table.loc[name, "difference"] == 0
        assert table.loc[name, "difference_low"] < 0 < table.loc[name, "difference_high"]


def test_one_batch_is_held_at_a_time() -> None:
    held: list[int] = []

    def batches():
        for i in range(3):
            # every perturbation of one batch has been evaluated before the next is asked for
            assert len(held) == i * len(PERTURBATIONS)
            yield halves([True, False])

    def forward(images: Pixels) -> np.ndarray:
        held.append(len(images))
        return brighter_side(images)

    measure_perturbations(as_classifier(forward), batches(), np.array([1, 0] * 3))
    assert held == [2] * 3 * len(PERTURBATIONS)


def test_spread_keeps_each_class_its_share() -> None:
    label_ids = np.repeat([2, 0, 1], [60, 30, 10])
    picked = pick_evenly(label_ids, 20)
    assert len(set(picked)) == 20
    assert (np.diff(picked) > 0).all()
    assert np.bincount(label_ids[picked]).tolist() == [6, 2, 12]
    # from all over: no gap between images of a class much above every fifth
    assert np.diff(picked[label_ids[picked] == 2]).max() <= 5
    assert (
        pick_evenly(label_ids, 100).tolist()
        == pick_evenly(label_ids, 1000).tolist()
        == list(range(100))
    )
    mixed = np.random.default_rng(0).permutation(label_ids)
    counts = np.bincount(mixed[pick_evenly(mixed, 33)])
    assert np.abs(counts - np.array([9.9, 3.3, 19.8])).max() < 1


@pytest.fixture
def classifier(tiny_backbone: None, manifest: Manifest, tmp_path: Path) -> Classifier:
    recipe = tiny_recipe()
    save_classifier(tmp_path, build_model(recipe, 3), manifest.class_names, recipe)
    return load_classifier(tmp_path)


def test_robustness_without_perturbation_is_the_evaluation(
    classifier: Classifier, manifest: Manifest
) -> None:
    scores = evaluate(classifier, manifest).scores
    table = measure_robustness(classifier, manifest)
    row = table.set_index("perturbation").loc["none"]
    assert row["images"] == len(manifest.rows("test"))
    assert row["accuracy"] == pytest.approx(scores["accuracy"])
    assert row["accuracy_low"] == pytest.approx(scores["accuracy_low"])
    assert (table["accuracy_low"] <= table["accuracy"]).all()
    assert (table["difference_low"] <= table["difference"]).all()
    assert (table["difference"] <= table["difference_high"]).all()
    np.testing.assert_allclose(table["difference"], table["accuracy"] - row["accuracy"], atol=1e-12)


def test_robustness_evaluates_the_picked_images(
    classifier: Classifier, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Pixels] = []
    monkeypatch.setattr(
        robustness, "PERTURBATIONS", {"none": lambda images: seen.append(images) or images}
    )
    table = measure_robustness(classifier, manifest, most=6)
    rows = manifest.rows("test").iloc[pick_evenly(manifest.rows("test")["label_id"].to_numpy(), 6)]
    expected = [classifier.decode((manifest.root / path).read_bytes()) for path in rows["path"]]
    np.testing.assert_array_equal(np.concatenate(seen), expected)
    assert seen[0].shape[1:] == (TINY_SIZE, TINY_SIZE, 3)
    ids = np.argmax(classifier.forward(np.stack(expected)), axis=1)
    labels = [classifier.class_names[i] for i in ids]
    assert table.loc[0, "accuracy"] == pytest.approx(np.mean(labels == rows["label"].to_numpy()))


def test_too_few_images_are_refused(classifier: Classifier, manifest: Manifest) -> None:
    with pytest.raises(UserError, match="at least 1 image; received 0"):
        measure_robustness(classifier, manifest, most=0)


def test_reencoding_is_pillows() -> None:
    file = io.BytesIO()
    Image.fromarray(IMAGES[0]).save(file, "JPEG", quality=20)
    np.testing.assert_array_equal(
        PERTURBATIONS["jpeg_quality_20"](IMAGES)[0], np.asarray(Image.open(file))
    )


def test_table_as_text() -> None:
    images = halves([True, False])
    text = format_table(
        measure_perturbations(as_classifier(brighter_side), [images], np.array([1, 0]))
    )
    lines = text.splitlines()
    assert len(lines) == 1 + len(PERTURBATIONS)
    assert lines[0].split() == [
        "perturbation",
        "accuracy",
        "difference",
        "(points)",
        "same",
        "label",
    ]
    assert lines[1].split()[:3] == ["none", "100.0%", "(34.2%"]
    (flipped,) = (line for line in lines if "flip_left_right" in line)
    assert "-100.0 (" in flipped and flipped.endswith(" 0.0%")
