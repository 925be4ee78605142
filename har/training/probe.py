"""Linear probe: the output layer solved for on fixed features, by logistic regression.

Each image that is not test is predicted once by a layer that was fitted without it (out of fold),
and the regularisation is chosen by these predictions. Then the layer is fitted on all of them.
"""

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from har.models.build import signed_root
from har.recipe import Recipe
from har.training.feature_cache import Features
from har.training.regression import Layer, fit_layers
from har.training.suspects import find_suspects
from har.util.errors import UserError
from har.util.progress import progress

Floats = npt.NDArray[np.floating[Any]]
# scikit-learn's C, the inverse of the L2 penalty's strength, to choose from, the strongest penalty
# first; for features of mean 0 and standard deviation 1.
GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
# What an output layer starts from where nothing chooses.
DEFAULT_C = 1e-3


@dataclass(frozen=True, kw_only=True)
class FoldedData:
    """What is predicted out of fold.

    `train` and `evaluated` are (views, images, features); `labels` and `folds` are (images,) ids
    below `classes`, and numbers from 0.
    """

    train: Features
    evaluated: Features
    labels: npt.NDArray[Any]
    folds: npt.NDArray[np.int64]
    classes: int
    recipe: Recipe

    @property
    def num_folds(self) -> int:
        """The number of folds."""
        return int(self.folds.max()) + 1

    def fit(self, fitted: npt.NDArray[np.bool_], grid: Sequence[float]) -> Iterator[Layer]:
        """Fit a layer for each C of `grid` on the images that `fitted`, (images,), marks."""
        return fit_layers(
            self.train[:, fitted], self.labels[fitted], self.classes, grid, self.recipe
        )


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A solved output layer.

    `probabilities` are those of every image out of fold, (images, classes), by the C that was
    chosen without it; None without folds. `grid` has a row for each C. `kept`, (images,), marks the
    images that the layer was fitted on: all, or all but the suspects.
    """

    layer: Layer
    c: float
    probabilities: npt.NDArray[np.float32] | None
    grid: pd.DataFrame
    kept: npt.NDArray[np.bool_]


def apply_root(features: Features) -> Features:
    """Do to features what the head of a model does before its output layer."""
    return np.asarray(signed_root(features))


def assign_folds(rows: pd.DataFrame, count: int, seed: int) -> npt.NDArray[np.int64]:
    """Return the fold, from 0, of each row (columns label_id, duplicate_group): copies of an image
    are in one fold, and each fold has about the same share of every label.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    if (most := rows["label_id"].value_counts().max()) < count:
        raise UserError(
            f"{count} folds need a label with {count} images outside the test split; the most"
            f" frequent label has {most}: add images"
        )
    folds = np.empty(len(rows), np.int64)
    splitter = StratifiedGroupKFold(count, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        # a label may have fewer images than there are folds
        warnings.simplefilter("ignore", UserWarning)
        parts = splitter.split(folds, rows["label_id"], rows["duplicate_group"])
        for fold, (_, held_out) in enumerate(parts):
            folds[held_out] = fold
    return folds


def predict_out_of_fold(
    data: FoldedData,
    checkpoint: Callable[[], None] = lambda: None,
    suspects: npt.NDArray[np.bool_] | None = None,
) -> tuple[npt.NDArray[np.float32], list[float]]:
    """Predict each image by layers that were fitted on the other folds.

    `suspects`, (folds, images), marks the images that the layer for a fold leaves out. Returns
    (C, images, classes) probabilities in the order of GRID, and the seconds that each C took.
    """
    found = np.empty((len(GRID), len(data.labels), data.classes), np.float32)
    seconds = np.zeros(len(GRID))
    with progress("linear probe, fold", data.num_folds) as advance:
        for fold in range(data.num_folds):
            held_out, started = data.folds == fold, time.monotonic()
            fitted = ~held_out if suspects is None else ~held_out & ~suspects[fold]
            for number, layer in enumerate(data.fit(fitted, GRID)):
                found[number, held_out] = layer.predict(data.evaluated[:, held_out])
                seconds[number] += time.monotonic() - started
                started = time.monotonic()
                checkpoint()
            advance(1)
    return found, seconds.tolist()


def report_probe(
    probe: Probe, train: Features, rows: pd.DataFrame, seconds: float
) -> dict[str, float]:
    """Return what an epoch would report: the loss and accuracies on the images trained on, as they
    are, and those out of fold of all images.
    """
    every, kept = rows["label_id"].to_numpy(), probe.kept
    found = {
        "train_": (probe.layer.predict(train[:1, kept]), every[kept]),
        "val_": (probe.probabilities, every),
    }
    metrics: dict[str, float] = {}
    for prefix, (probabilities, labels) in found.items():
        if probabilities is None:
            continue
        order = np.argsort(-probabilities, axis=1)
        metrics |= {
            f"{prefix}loss": float(log_losses(probabilities, labels).mean()),
            f"{prefix}accuracy": float((order[:, 0] == labels).mean()),
            f"{prefix}top_3_accuracy": float((order[:, :3] == labels[:, None]).any(axis=1).mean()),
        }
    return metrics | {"epoch_time_s": seconds, "images_per_second": len(rows) / seconds}


def describe_probe(probe: Probe, metrics: dict[str, float]) -> str:
    """Describe a solved layer in one line."""
    validation = (
        f"  out of fold {metrics['val_loss']:.3f} {metrics['val_accuracy']:.3f}"
        if "val_loss" in metrics
        else ""
    )
    left_out = int((~probe.kept).sum())
    without = f"  without {left_out:,} of {len(probe.kept):,} suspects" if left_out else ""
    return (
        f"linear probe: C {probe.c:g}  loss {metrics['train_loss']:.3f} acc"
        f" {metrics['train_accuracy']:.3f}{validation}{without}"
        f"  {metrics['epoch_time_s']:.1f} s"
    )


def log_losses(probabilities: Floats, labels: npt.NDArray[Any]) -> Floats:
    """Return the log loss of each image."""
    own = probabilities[..., np.arange(len(labels)), labels]
    return np.asarray(-np.log(np.maximum(own, 1e-12)))


def choose_c(
    probabilities: npt.NDArray[np.float32], labels: npt.NDArray[Any], folds: npt.NDArray[np.int64]
) -> tuple[int, npt.NDArray[np.int64]]:
    """Choose from (C, images, classes) the number of the C with the smallest mean log loss: of all
    images, and for each fold that of the images outside it, so that no image is scored with a C
    that its own label helped to choose.
    """
    losses = log_losses(probabilities, labels)
    by_fold = [
        int(losses[:, folds != fold].mean(axis=1).argmin()) for fold in range(folds.max() + 1)
    ]
    return int(losses.mean(axis=1).argmin()), np.array(by_fold)


def find_suspects_by_fold(
    data: FoldedData, c: float, checkpoint: Callable[[], None] = lambda: None
) -> npt.NDArray[np.bool_]:
    """Mark for each fold, (folds, images), the suspects outside it, found without its images: their
    labels have no say in which images the layer that predicts them leaves out.
    """
    count, labels, folds = data.num_folds, data.labels, data.folds
    predicted = np.zeros((count, len(labels), data.classes), np.float32)
    suspects = np.zeros((count, len(labels)), bool)
    pairs = list(combinations(range(count), 2))
    with progress("labels in doubt, two folds", len(pairs)) as advance:
        for pair in pairs:
            (layer,) = data.fit(~np.isin(folds, pair), [c])
            for fold, other in (pair, pair[::-1]):
                predicted[fold, folds == other] = layer.predict(data.evaluated[:, folds == other])
            checkpoint()
            advance(1)
    for fold in range(count):
        outside = folds != fold
        suspects[fold, outside] = find_suspects(predicted[fold, outside], labels[outside])
    return suspects


@dataclass(frozen=True, kw_only=True)
class OutOfFold:
    """Predictions of each image by a layer that was fitted without it.

    `probabilities` is (images, classes), each image by the C that was chosen without it. `best` is
    the number in GRID of the C for all images, and `grid` has a row for each C.
    """

    probabilities: npt.NDArray[np.float32]
    best: int
    grid: pd.DataFrame


def cross_validate(
    data: FoldedData,
    checkpoint: Callable[[], None] = lambda: None,
    suspects: npt.NDArray[np.bool_] | None = None,
) -> OutOfFold:
    """Predict each image out of fold as `predict_out_of_fold`, and choose C by that."""
    found, seconds = predict_out_of_fold(data, checkpoint, suspects)
    labels = data.labels
    best, by_fold = choose_c(found, labels, data.folds)
    grid = {
        "C": GRID,
        "accuracy": (found.argmax(axis=2) == labels).mean(axis=1),
        "log_loss": log_losses(found, labels).mean(axis=1),
        "seconds": seconds,
    }
    return OutOfFold(
        probabilities=found[by_fold[data.folds], np.arange(len(labels))],
        best=best,
        grid=pd.DataFrame(grid),
    )


def count_folds(recipe: Recipe) -> int:
    """Return how many folds give the recipe's share of validation images."""
    return max(2, round(1 / recipe.validation_fraction))


def solve(
    train: Features,
    evaluated: Features,
    rows: pd.DataFrame,
    classes: int,
    recipe: Recipe,
    checkpoint: Callable[[], None] = lambda: None,
) -> Probe:
    """Choose C by folds, and fit the layer on all rows, or all but the suspects; without
    validation, use DEFAULT_C.
    """
    labels, kept = rows["label_id"].to_numpy(), np.ones(len(rows), bool)
    if not recipe.validation_fraction:
        (layer,) = fit_layers(train, labels, classes, [DEFAULT_C], recipe)
        return Probe(layer=layer, c=DEFAULT_C, probabilities=None, grid=pd.DataFrame(), kept=kept)
    folds = assign_folds(rows, count_folds(recipe), recipe.seed)
    data = FoldedData(
        train=train,
        evaluated=evaluated,
        labels=labels,
        folds=folds,
        classes=classes,
        recipe=recipe,
    )
    found = cross_validate(data, checkpoint)
    if recipe.suspects == "leave_out":
        kept = ~find_suspects(found.probabilities, labels)
        outside = find_suspects_by_fold(data, GRID[found.best], checkpoint)
        found = cross_validate(data, checkpoint, outside)
    # every C up to the best: each solution starts from the one before
    grid = GRID[: found.best + 1]
    *_, layer = data.fit(kept, grid)
    return Probe(
        layer=layer,
        c=GRID[found.best],
        probabilities=found.probabilities,
        grid=found.grid,
        kept=kept,
    )
