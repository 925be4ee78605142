"""A classifier judged on a split: numbers, tables, figures."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import tensorflow as tf
from matplotlib.figure import Figure

from har import metrics
from har.classifier import BATCH_SIZE, Classifier
from har.errors import UserError
from har.manifest import Manifest
from har.pipeline import build_stream_loader
from har.progress import progress


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """`probabilities` is (images, classes) and `label_ids` (images,), in the classifier's
    order of classes and the split's order of images (`paths`).
    """

    class_names: tuple[str, ...]
    paths: list[str]
    label_ids: npt.NDArray[np.integer]
    probabilities: npt.NDArray[np.float32]

    @property
    def scores(self) -> metrics.Scores:
        """Every reported scalar."""
        return metrics.score(self.probabilities, self.label_ids)

    @property
    def per_class(self) -> pd.DataFrame:
        """One row a class: label, precision, recall, f1, images."""
        columns = metrics.class_scores(self.probabilities, self.label_ids)
        return pd.DataFrame({"label": self.class_names, **columns})

    @property
    def predictions(self) -> pd.DataFrame:
        """One row an image: path, label, predicted, probability (of the predicted one), and
        each class's probability under its name.
        """
        names = np.array(self.class_names)
        table = pd.DataFrame(
            {
                "path": self.paths,
                "label": names[self.label_ids],
                "predicted": names[metrics.predicted_ids(self.probabilities)],
                "probability": self.probabilities.max(axis=1),
            }
        )
        by_class = pd.DataFrame(self.probabilities, columns=[f"p_{n}" for n in self.class_names])
        return pd.concat([table, by_class], axis=1)


def evaluate(classifier: Classifier, manifest: Manifest) -> Evaluation:
    """Judge on the manifest's test split, decoded as in training.

    Raises:
        UserError: there is no test split, or it has labels the classifier does not know.
    """
    rows = manifest.rows("test")
    if rows.empty:
        raise UserError("the data has no test split (test_fraction is 0): nothing to judge on")
    ids = {name: i for i, name in enumerate(classifier.class_names)}
    if unknown := sorted(set(rows["label"]) - set(ids)):
        raise UserError(
            f"the model does not know the labels {', '.join(unknown)}; it knows"
            f" {', '.join(classifier.class_names)}"
        )
    load = build_stream_loader(manifest, rows, classifier.recipe)
    batches = load(tf.data.Dataset.range(len(rows)), BATCH_SIZE, False).prefetch(2)
    parts = []
    with progress("judging on test images", len(rows)) as advance:
        for images, _ in batches:
            parts.append(classifier.forward(images).numpy())
            advance(len(images))
    return Evaluation(
        class_names=classifier.class_names,
        paths=rows["path"].tolist(),
        label_ids=rows["label"].map(ids).to_numpy(),
        probabilities=np.concatenate(parts),
    )


def draw_confusion(evaluation: Evaluation) -> Figure:
    """The confusion matrix: shade is the share of a true class, numbers count images."""
    counts = metrics.confusion(evaluation.probabilities, evaluation.label_ids)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size = 2.5 + 0.42 * len(counts)
    figure = Figure(figsize=(size + 0.6, size), layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        if count:
            dark = shares[row, column] > 0.5
            axes.text(column, row, str(count), ha="center", va="center", color="w" if dark else "k")
    ticks: Any = range(len(counts))
    axes.set_xticks(ticks, evaluation.class_names, rotation=60, ha="right", rotation_mode="anchor")
    axes.set_yticks(ticks, evaluation.class_names)
    axes.set(xlabel="predicted", ylabel="true")
    scores = evaluation.scores
    axes.set_title(
        f"{scores.accuracy:.1%} of {len(evaluation.label_ids)} test images right"
        f" (95 % interval {scores.accuracy_low:.1%} to {scores.accuracy_high:.1%})"
    )
    figure.colorbar(picture, label="share of the true class", shrink=0.8)
    return figure


def draw_curves(history: list[dict[str, float]]) -> Figure:
    """Loss and accuracy of training and validation, by epoch."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    epochs = range(1, len(history) + 1)
    for axes, name in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for prefix, label in (("train", "training"), ("val", "validation")):
            if f"{prefix}_{name}" in history[0]:
                values = [epoch[f"{prefix}_{name}"] for epoch in history]
                axes.plot(epochs, values, marker=".", label=label)
        axes.set(xlabel="epoch", ylabel=name)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    return figure
