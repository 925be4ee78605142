"""Logistic regression on features: the same as scikit-learn's, for classes without images too."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from har.recipe import Recipe
from har.training.probe import GRID
from har.training.regression import fit_layers
from tests.fixtures import tiny_recipe

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
