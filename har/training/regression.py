"""Logistic regression on features, as a dense softmax layer."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from har.recipe import Recipe
from har.training.feature_cache import Features

Floats = npt.NDArray[np.floating[Any]]
# The logit of a class that has no image: far below every other.
NEVER = -30.0
MAX_ITERATIONS = 300
TOLERANCE = 1e-3
# A constant feature is divided by this in the place of its deviation.
SMALLEST_DEVIATION = 1e-6


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A dense softmax layer: kernel (features, classes) and bias (classes,), float32."""

    kernel: npt.NDArray[np.float32]
    bias: npt.NDArray[np.float32]

    def predict(self, views: Features) -> npt.NDArray[np.float32]:
        """Map (views, images, features) to (images, classes) probabilities, averaged over views."""
        return np.mean([_softmax(each @ self.kernel + self.bias) for each in views], axis=0)


def _softmax(logits: Floats) -> Floats:
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=1, keepdims=True))


def fit_layers(
    views: Features, labels: npt.NDArray[Any], classes: int, grid: Sequence[float], recipe: Recipe
) -> Iterator[Layer]:
    """Fit a layer for each C of `grid`, in turn, on (views, images, features); every view of an
    image counts as an image of its own.
    """
    # loads for a second
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    if len(present := np.unique(labels)) == 1:
        # a fold of a tiny data set; nothing to tell apart
        bias = np.where(np.arange(classes) == present[0], 0.0, NEVER).astype(np.float32)
        layer = Layer(kernel=np.zeros((views.shape[-1], classes), np.float32), bias=bias)
        yield from (layer for _ in grid)
        return
    # its steps are small: on a busy machine more threads mostly wait for each other
    from threadpoolctl import threadpool_limits

    rows = views.reshape(-1, views.shape[-1])
    mean = rows.mean(axis=0, dtype=np.float64)
    deviation = rows.std(axis=0, dtype=np.float64) + SMALLEST_DEVIATION
    scaled = ((rows - mean) / deviation).astype(np.float32)
    repeated = np.tile(labels, len(views))
    model = LogisticRegression(
        max_iter=MAX_ITERATIONS,
        tol=TOLERANCE,
        # each C starts from the solution of the one before
        warm_start=True,
        class_weight="balanced" if recipe.class_weight == "balanced" else None,
    )
    for c in grid:
        with warnings.catch_warnings(), threadpool_limits(1):
            # the last digits of a solution decide nothing
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.set_params(C=c).fit(scaled, repeated)
        kernel, bias = _spread(model, classes)
        kernel = kernel / deviation[:, None]
        yield Layer(
            kernel=kernel.astype(np.float32), bias=(bias - mean @ kernel).astype(np.float32)
        )


def _spread(model: Any, classes: int) -> tuple[Floats, Floats]:
    """Return a kernel and a bias for all classes: scikit-learn has one column for two classes, and
    none for a class without images.
    """
    coefficients, intercepts = model.coef_, model.intercept_
    if len(coefficients) == 1:
        coefficients = np.concatenate([-coefficients, coefficients]) / 2
        intercepts = np.concatenate([-intercepts, intercepts]) / 2
    kernel = np.zeros((coefficients.shape[1], classes))
    bias = np.full(classes, NEVER)
    kernel[:, model.classes_] = coefficients.T
    bias[model.classes_] = intercepts
    return kernel, bias
