"""The linear probe: solved right, chosen without the images it is scored on."""

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression

from har.recipe import Recipe
from har.training import probe
from har.training.probe import (
    GRID,
    assign_folds,
    choose_c,
    fit_layers,
    predict_out_of_fold,
    report_probe,
    solve,
)
from tests.conftest import tiny_recipe

CLASSES = 3


@pytest.fixture
def recipe() -> Recipe:
    return tiny_recipe("v6")


def draw(images: int = 90, features: int = 6, noise: float = 1.0, seed: int = 0):
    """Two views of images whose classes can be told apart, of very unequal scales."""
    rng = np.random.default_rng(seed)
    labels = np.arange(images) % CLASSES
    centres = rng.normal(0, 1, (CLASSES, features))
    scales = 10.0 ** np.arange(features)
    views = (centres[labels] + rng.normal(0, noise, (2, images, features))) * scales + 7
    return views.astype(np.float32), labels


def rows_of(labels: np.ndarray, copies: int = 1) -> pd.DataFrame:
    """Rows whose neighbours of one label, `copies` at a time, are copies of one image."""
    order = np.argsort(labels, kind="stable")
    groups = np.empty(len(labels), np.int64)
    groups[order] = np.arange(len(labels)) // copies
    return pd.DataFrame({"label_id": labels, "duplicate_group": groups})


@pytest.mark.parametrize("c", [GRID[0], GRID[-1]])
def test_the_layer_is_the_regression_on_standardised_features(c: float, recipe: Recipe) -> None:
    views, labels = draw()
    (layer,) = fit_layers(views, labels, CLASSES, [c], recipe)
    rows = views.reshape(-1, views.shape[-1]).astype(np.float64)
    scaled = (rows - rows.mean(axis=0)) / rows.std(axis=0)
    reference = LogisticRegression(C=c, max_iter=5000, tol=1e-8).fit(scaled, np.tile(labels, 2))
    found = np.concatenate([layer.predict(each[None]) for each in views])
    np.testing.assert_allclose(found, reference.predict_proba(scaled), atol=5e-3)


def test_views_are_averaged(recipe: Recipe) -> None:
    views, labels = draw()
    (layer,) = fit_layers(views, labels, CLASSES, [1e-2], recipe)
    each = [layer.predict(view[None]) for view in views]
    np.testing.assert_allclose(layer.predict(views), np.mean(each, axis=0), rtol=1e-6)


def test_balanced_classes_weigh_the_same() -> None:
    """With useless features and the strongest penalty, only the frequencies are learned."""
    labels = np.array([0] * 60 + [1] * 20 + [2] * 10)
    views = np.random.default_rng(0).normal(0, 1, (1, 90, 2)).astype(np.float32)
    for weight, expected in (("none", [6 / 9, 2 / 9, 1 / 9]), ("balanced", [1 / 3] * 3)):
        recipe = tiny_recipe("v6", class_weight=weight)
        (layer,) = fit_layers(views, labels, CLASSES, [1e-6], recipe)
        np.testing.assert_allclose(layer.predict(views).mean(axis=0), expected, atol=0.02)


@pytest.mark.parametrize("present", [[0], [0, 2], [0, 1, 2]])
def test_a_class_without_images_is_never_predicted(present: list[int], recipe: Recipe) -> None:
    views, _ = draw()
    labels = np.array(present)[np.arange(90) % len(present)]
    (layer,) = fit_layers(views, labels, CLASSES, [1e-2], recipe)
    probabilities = layer.predict(views)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    absent = sorted(set(range(CLASSES)) - set(present))
    assert probabilities[:, absent].sum() < 1e-3


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
    found, seconds = predict_out_of_fold(views, views, labels, CLASSES, folds, recipe)
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
