"""Evaluate a classifier on the test split: metrics and tables."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import tensorflow as tf

from har.data.duplicates import has_copy
from har.data.images import Pixels
from har.data.manifest import Manifest
from har.evaluation import metrics
from har.inference.classifier import Classifier
from har.inference.runtimes import BATCH_SIZE
from har.training.bad_images import name_bad_images
from har.training.calibration import scale
from har.training.feature_cache import Features
from har.training.loaders import build_stream_loader, prefetch
from har.util.errors import UserError
from har.util.progress import progress

# With more images times classes than this, the file of predictions would have 50 MB and more.
MOST_PROBABILITIES = 5_000_000
# The most classes that are printed.
MOST_PRINTED = 50
# The most labels that a message lists.
MOST_LISTED = 20
# Allowed difference of probabilities between two float32 forward passes.
MAX_DIFFERENCE = 0.01


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Predictions for a split: `probabilities` is (images, classes) and `label_ids` (images,).

    Classes are in the classifier's order, images in the split's order, as in `paths`.
    """

    class_names: tuple[str, ...]
    paths: list[str]
    label_ids: npt.NDArray[np.integer]
    probabilities: npt.NDArray[np.float32]

    @property
    def scores(self) -> dict[str, float]:
        """The metrics of `metrics.TEST_METRICS` by name."""
        return metrics.score(self.probabilities, self.label_ids)

    @property
    def per_class(self) -> pd.DataFrame:
        """One row for each class: label, and the columns of `metrics.class_scores`."""
        columns = metrics.class_scores(self.probabilities, self.label_ids)
        return pd.DataFrame({"label": self.class_names, **columns})

    @property
    def reliability(self) -> pd.DataFrame:
        """One row for each bin of confidence, with the columns of `metrics.reliability`."""
        return pd.DataFrame(metrics.reliability(self.probabilities, self.label_ids))

    @property
    def confusion(self) -> pd.DataFrame:
        """One row for each pair of classes that has images: true, predicted, count."""
        names = np.array(self.class_names, dtype=object)
        true, predicted, count = metrics.confusion(self.probabilities, self.label_ids).T
        columns = {"true": names[true], "predicted": names[predicted], "count": count}
        return pd.DataFrame(columns)

    @property
    def predictions(self) -> pd.DataFrame:
        """One row for each image: path, label, predicted, probability (of the predicted class).

        A column p_NAME has the probability of each class, if that is at most MOST_PROBABILITIES in
        all.
        """
        # as objects: one long name would make every text of an array as long
        names = np.array(self.class_names, dtype=object)
        table = pd.DataFrame(
            {
                "path": self.paths,
                "label": names[self.label_ids],
                "predicted": names[metrics.predicted_ids(self.probabilities)],
                "probability": self.probabilities.max(axis=1),
            }
        )
        if self.probabilities.size > MOST_PROBABILITIES:
            return table
        by_class = pd.DataFrame(self.probabilities, columns=[f"p_{n}" for n in self.class_names])
        return pd.concat([table, by_class], axis=1)

    @property
    def mistakes(self) -> pd.DataFrame:
        """Wrong predictions, the most confident first: path, label, predicted, probability."""
        wrong = metrics.predicted_ids(self.probabilities) != self.label_ids
        table = self.predictions.loc[wrong, ["path", "label", "predicted", "probability"]]
        return table.sort_values("probability", ascending=False, kind="stable", ignore_index=True)


def evaluate(classifier: Classifier, manifest: Manifest) -> Evaluation:
    """Evaluate on the manifest's test split, decoded as in training."""
    rows = load_test_rows(classifier, manifest)
    parts = []
    with progress("evaluating on test images", len(rows)) as advance:
        for images, _ in read_batches(classifier, manifest, rows):
            parts.append(classifier.forward(images))
            advance(len(images))
    return _build_evaluation(classifier, rows, np.concatenate(parts))


def _build_evaluation(
    classifier: Classifier, rows: pd.DataFrame, probabilities: npt.NDArray[np.float32]
) -> Evaluation:
    if not np.isfinite(probabilities).all():
        raise UserError(
            "the model's probabilities are not finite: its training diverged; try a lower"
            " --learning-rate"
        )
    return Evaluation(
        class_names=classifier.class_names,
        paths=rows["path"].tolist(),
        label_ids=rows["label_id"].to_numpy(),
        probabilities=probabilities,
    )


def evaluate_features(
    classifier: Classifier, manifest: Manifest, head: Any, features: Features, temperature: float
) -> Evaluation:
    """Evaluate from the (views, images, features) of the test split; `head` maps features to
    probabilities, which are averaged over the views and scaled by the temperature.

    The classifier predicts the first batch of images too, as a check.
    """
    rows = load_test_rows(classifier, manifest)
    parts = [
        np.mean([np.asarray(head(view[i : i + 1024])) for view in features], axis=0)
        for i in range(0, len(rows), 1024)
    ]
    probabilities = scale(np.concatenate(parts), temperature)
    evaluation = _build_evaluation(classifier, rows, probabilities)
    images, indices = next(iter(read_batches(classifier, manifest, rows)))
    expected = evaluation.probabilities[indices]
    difference = float(np.abs(classifier.forward(images) - expected).max())
    if not difference <= MAX_DIFFERENCE:
        raise UserError(
            f"the logged model's probabilities differ by {difference:.2g} from those computed from"
            f" features, more than {MAX_DIFFERENCE}: run `har cache --clear`, then train again"
        )
    return evaluation


def format_classes(per_class: pd.DataFrame) -> str:
    """Format the table of classes for the terminal; of many classes, those of the lowest recall."""
    shown, classes = per_class, len(per_class)
    if classes > MOST_PRINTED:
        known = per_class[per_class["images"] > 0]
        shown = known.sort_values("recall", kind="stable").head(MOST_PRINTED)
    lines = [shown.to_string(index=False, float_format="{:.3f}".format)]
    if len(shown) < classes:
        lines.append(
            f"{len(shown)} of {classes:,} classes, those with the lowest recall; the run's"
            " evaluation/per_class.csv has all"
        )
    return "\n".join(lines)


def tabulate_by_duplicate(evaluation: Evaluation, manifest: Manifest) -> pd.DataFrame:
    """Compare accuracy on test images with a copy in train, exact or near, and on the others.

    The two rows have the columns duplicate_in_train (yes, no), images, accuracy, accuracy_low,
    accuracy_high; without images, accuracies are NaN. The first row has images unless the data
    was prepared with duplicates=near, and shows what it gains to have seen a copy in training.
    """
    test, train = manifest.rows("test"), manifest.rows("train")
    copied = has_copy(test, train)
    hits = metrics.top_k_hits(evaluation.probabilities, evaluation.label_ids, 1)
    rows = []
    for name, chosen in (("yes", copied), ("no", ~copied)):
        images, right = int(chosen.sum()), int(hits[chosen].sum())
        low, high = metrics.wilson_interval(right, images) if images else (np.nan, np.nan)
        accuracy = right / images if images else np.nan
        rows.append((name, images, accuracy, low, high))
    columns = ["duplicate_in_train", "images", "accuracy", "accuracy_low", "accuracy_high"]
    return pd.DataFrame(rows, columns=columns)


def load_test_rows(classifier: Classifier, manifest: Manifest) -> pd.DataFrame:
    """Return the test split, with `label_id` in the classifier's order of classes."""
    rows = manifest.rows("test")
    if rows.empty:
        raise UserError(
            "the data has no test split (test_fraction is 0): use a --test-fraction above 0"
        )
    ids = {name: i for i, name in enumerate(classifier.class_names)}
    if unknown := sorted(set(rows["label"]) - set(ids)):
        raise UserError(
            f"the model does not know the labels {_list_labels(unknown)}; it knows"
            f" {_list_labels(classifier.class_names)}"
        )
    return rows.assign(label_id=rows["label"].map(ids))


def _list_labels(labels: Sequence[str]) -> str:
    more = len(labels) - MOST_LISTED
    return ", ".join(labels[:MOST_LISTED]) + (f" and {more:,} more" if more > 0 else "")


def read_batches(
    classifier: Classifier, manifest: Manifest, rows: pd.DataFrame
) -> Iterator[tuple[Pixels, metrics.Ints]]:
    """Yield (images, row numbers) for all rows in order, decoded as in training.

    The batches are (batch, size, size, 3) uint8 and (batch,) int64.
    """
    recipe = classifier.recipe
    load = build_stream_loader(manifest, rows, recipe.at_size(recipe.served_size))
    batches = prefetch(load(tf.data.Dataset.range(len(rows)), BATCH_SIZE, False))
    with name_bad_images(manifest):
        yield from batches.as_numpy_iterator()
