"""The linear probe: solved right, chosen without the images it is scored on."""

import numpy as np
import pandas as pd
import pytest

from har.recipe import Recipe
from har.training import probe
from har.training.probe import (
    GRID,
    FoldedData,
    assign_folds,
    choose_c,
    describe_probe,
    find_suspects_by_fold,
    predict_out_of_fold,
    report_probe,
    solve,
)
from har.training.regression import fit_layers
from har.util.errors import UserError
from tests.fixtures import tiny_recipe
from tests.training.test_regression import draw

CLASSES = 3


@pytest.fixture
def recipe() -> Recipe:
    return tiny_recipe("v6")


def folded(views: np.ndarray, labels: np.ndarray, folds: np.ndarray, recipe: Recipe) -> FoldedData:
    return FoldedData(
        train=views, evaluated=views, labels=labels, folds=folds, classes=CLASSES, recipe=recipe
    )


def rows_of(labels: np.ndarray, copies: int = 1) -> pd.DataFrame:
    """Rows whose neighbours of one label, `copies` at a time, are copies of one image."""
    order = np.argsort(labels, kind="stable")
    groups = np.empty(len(labels), np.int64)
    groups[order] = np.arange(len(labels)) // copies
    return pd.DataFrame({"label_id": labels, "duplicate_group": groups})


@pytest.mark.parametrize("copies", [1, 3])
def test_folds_keep_copies_together_and_labels_even(copies: int) -> None:
    labels = np.arange(180) % CLASSES
    rows = rows_of(labels, copies)
    folds = assign_folds(rows, 5, seed=0)
    assert rows.groupby("duplicate_group").size().eq(copies).all()
    assert pd.Series(folds).groupby(rows["duplicate_group"]).nunique().eq(1).all()
    counts = pd.crosstab(folds, labels).to_numpy()
    assert counts.shape == (5, CLASSES)
    assert np.ptp(counts) <= 2 * copies
    assert not np.array_equal(assign_folds(rows, 5, seed=1), folds)


def test_no_image_is_predicted_by_a_layer_that_saw_it(recipe: Recipe) -> None:
    """Of labels drawn at random, a layer remembers those that it saw, and guesses the others."""
    rng = np.random.default_rng(0)
    views = rng.normal(0, 1, (1, 240, 400)).astype(np.float32)
    labels = rng.integers(0, CLASSES, 240)
    folds = assign_folds(rows_of(labels), 4, seed=0)
    found, seconds = predict_out_of_fold(folded(views, labels, folds, recipe))
    assert found.shape == (len(GRID), 240, CLASSES) and len(seconds) == len(GRID)
    accuracy = (found[-1].argmax(axis=1) == labels).mean()
    assert accuracy == pytest.approx(1 / CLASSES, abs=0.1)
    (layer,) = fit_layers(views, labels, CLASSES, [GRID[-1]], recipe)
    assert (layer.predict(views).argmax(axis=1) == labels).mean() == 1


def test_a_fold_has_no_say_in_its_own_c() -> None:
    """Fold 0 alone would choose C number 1, the others number 0."""
    labels, folds = np.zeros(6, np.int64), np.array([0, 0, 1, 1, 2, 2])
    found = np.empty((2, 6, 2), np.float32)
    found[0], found[1] = [0.6, 0.4], [0.5, 0.5]
    found[1, folds == 0] = [1.0, 0.0]
    best, by_fold = choose_c(found, labels, folds)
    assert best == 1 and by_fold.tolist() == [0, 1, 1]


def test_solving_chooses_what_predicts_unseen_images_best(recipe: Recipe) -> None:
    views, labels = draw(images=300, noise=3.0)
    rows = rows_of(labels)
    found = solve(views, views, rows, CLASSES, recipe)
    assert found.probabilities is not None and found.probabilities.shape == (300, CLASSES)
    assert list(found.grid) == ["C", "accuracy", "log_loss", "seconds"]
    assert found.c == found.grid.loc[found.grid["log_loss"].idxmin(), "C"]
    others, _ = draw(images=300, noise=3.0, seed=0)
    metrics = report_probe(found, others, rows, 2.0)
    assert metrics["val_accuracy"] == pytest.approx(
        (found.probabilities.argmax(axis=1) == labels).mean()
    )
    assert metrics["images_per_second"] == 150


def test_without_validation_nothing_is_chosen(recipe: Recipe) -> None:
    views, labels = draw()
    plain = tiny_recipe(
        "v6", validation_fraction=0.0, calibration="none", patience=0, checkpoint="last"
    )
    found = solve(views, views, rows_of(labels), CLASSES, plain)
    assert found.probabilities is None and found.c == probe.DEFAULT_C
    assert "val_loss" not in report_probe(found, views, rows_of(labels), 1.0)


def plant(labels: np.ndarray, share: float = 0.08) -> tuple[np.ndarray, np.ndarray]:
    planted = np.random.default_rng(5).random(len(labels)) < share
    return np.where(planted, (labels + 1) % CLASSES, labels), planted


def test_suspects_are_left_out_and_still_predicted() -> None:
    views, true = draw(images=300, noise=0.3)
    labels, planted = plant(true)
    rows = rows_of(labels)
    kept, without = (
        solve(views, views, rows, CLASSES, tiny_recipe("v6", suspects=name))
        for name in ("keep", "leave_out")
    )
    assert kept.kept.all() and planted.sum() > 15
    # recall and precision
    assert (~without.kept)[planted].mean() >= 0.9 and planted[~without.kept].mean() >= 0.9
    assert without.probabilities is not None and without.probabilities.shape == (300, CLASSES)
    metrics = report_probe(without, views, rows, 1.0)
    # scored on every image, planted errors included
    assert metrics["val_accuracy"] == (without.probabilities.argmax(axis=1) == labels).mean() < 1
    losses = [
        -np.log(each.layer.predict(views)[np.arange(300), true]).mean() for each in (kept, without)
    ]
    assert losses[1] < losses[0]
    assert f"without {(~without.kept).sum()} of 300 suspects" in describe_probe(without, metrics)


def test_the_layer_saw_no_suspect() -> None:
    views, true = draw(images=300, noise=0.5)
    labels, _ = plant(true)
    recipe = tiny_recipe("v6", suspects="leave_out")
    found = solve(views, views, rows_of(labels), CLASSES, recipe)
    grid = GRID[: GRID.index(found.c) + 1]
    *_, expected = fit_layers(views[:, found.kept], labels[found.kept], CLASSES, grid, recipe)
    np.testing.assert_array_equal(found.layer.kernel, expected.kernel)


def test_a_fold_has_no_say_in_what_its_layer_leaves_out(recipe: Recipe) -> None:
    views, true = draw(images=300, noise=1.0)
    labels, _ = plant(true)
    folds = assign_folds(rows_of(labels), 5, seed=0)
    other = labels.copy()
    other[folds == 2] = np.random.default_rng(0).permutation(other[folds == 2])
    before, after = (
        find_suspects_by_fold(folded(views, each, folds, recipe), 1e-2) for each in (labels, other)
    )
    np.testing.assert_array_equal(before[2], after[2])
    assert before[2].any() and not before[2, folds == 2].any()
    assert (before[0] != after[0]).any()


def test_too_few_images_for_the_folds_are_counted() -> None:
    with pytest.raises(UserError, match=r"5 folds need a label with 5 images.* has 4: add images"):
        assign_folds(rows_of(np.arange(12) % CLASSES), 5, seed=0)
