"""`audit(job)` finds the images whose label the linear probe doubts, without the test split."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import keras
import numpy as np
import numpy.typing as npt
import pandas as pd

from har.inference.freezing import compute_float32_in_full
from har.models.build import build_model, find_backbone
from har.models.devices import make_deterministic
from har.training.bad_images import name_bad_images
from har.training.feature_cache import Features, check_limit
from har.training.features import Extraction, evaluation_views
from har.training.job import TrainingJob
from har.training.loaders import check_feature_memory
from har.training.probe import FoldedData, apply_root, assign_folds, count_folds, cross_validate
from har.training.suspects import check_cleanlab, find_suspects, suggest_labels
from har.util.errors import UserError
from har.util.signals import defer_interrupts

# Digits of a probability in the table.
DIGITS = 4


@dataclass(frozen=True, kw_only=True)
class Audit:
    """The labels in doubt.

    `suspects` has a row for each, the strongest doubt first: path, label, suggested (the most
    probable other label), label_probability, suggested_probability, and score, their difference
    from -1 (certainly another label) to 1. `by_class` has the columns label, images, suspects, for
    each class, most suspects first. `accuracy` is that of all images out of fold.
    """

    suspects: pd.DataFrame
    by_class: pd.DataFrame
    images: int
    folds: int
    accuracy: float


def audit(job: TrainingJob) -> Audit:
    """Predict every image of the train split by a linear probe that was fitted without it and its
    copies, and find the labels that these predictions doubt.

    Raises:
        UserError: cleanlab is missing, there are too few images, an image is gone or changed, or
            the features fit neither the memory nor the cache.
    """
    check_cleanlab()
    rows, recipe = job.manifest.rows("train"), job.used
    if rows.empty:
        raise UserError("every image is a test image: use a smaller --test-fraction")
    make_deterministic()
    compute_float32_in_full()
    keras.utils.set_random_seed(recipe.seed)
    folds = assign_folds(rows, count_folds(recipe), recipe.seed)
    labels, classes = rows["label_id"].to_numpy(), len(job.manifest.class_names)
    with name_bad_images(job.manifest):
        views = apply_root(_extract(job, rows))
    with defer_interrupts() as checkpoint:
        data = FoldedData(
            train=views, evaluated=views, labels=labels, folds=folds, classes=classes, recipe=recipe
        )
        found = cross_validate(data, checkpoint)
    suspects = tabulate_suspects(rows, found.probabilities, job.manifest.class_names)
    return Audit(
        suspects=suspects,
        by_class=_count_by_class(rows, suspects),
        images=len(rows),
        folds=int(folds.max()) + 1,
        accuracy=float((found.probabilities.argmax(axis=1) == labels).mean()),
    )


def _extract(job: TrainingJob, rows: pd.DataFrame) -> Features:
    """Compute or read the (views, rows, features) of the views that a trained model averages."""
    recipe, views = job.used, evaluation_views(job.used)
    model = build_model(replace(recipe, precision="float32"), len(job.manifest.class_names))
    extraction = Extraction(find_backbone(model), job.manifest, recipe, job.feature_runtime)
    size = int(np.prod(extraction.count_features(views[0]))) * extraction.dtype.itemsize
    check_limit(size * len(views) * len(rows))
    check_feature_memory(len(rows), len(views), size)
    return extraction.all_views(rows, views)


def tabulate_suspects(
    rows: pd.DataFrame, probabilities: npt.NDArray[np.float32], class_names: Sequence[str]
) -> pd.DataFrame:
    """Return the table `Audit.suspects` of rows (path, label, label_id) and their (rows, classes)
    out-of-fold probabilities.
    """
    labels = rows["label_id"].to_numpy()
    suggested, margins = suggest_labels(probabilities, labels)
    numbers = np.arange(len(rows))
    # as objects: one long name would make every text of an array as long
    names = np.array(class_names, dtype=object)
    table = pd.DataFrame(
        {
            "path": rows["path"],
            "label": rows["label"],
            "suggested": names[suggested],
            "label_probability": probabilities[numbers, labels].round(DIGITS),
            "suggested_probability": probabilities[numbers, suggested].round(DIGITS),
            "score": margins.round(DIGITS),
        }
    )
    table = table[find_suspects(probabilities, labels)]
    return table.sort_values(["score", "path"], kind="stable", ignore_index=True)


def _count_by_class(rows: pd.DataFrame, suspects: pd.DataFrame) -> pd.DataFrame:
    images = rows["label"].value_counts(sort=False)
    doubted = suspects["label"].value_counts().reindex(images.index, fill_value=0)
    table = pd.DataFrame(
        {"label": images.index, "images": images.to_numpy(), "suspects": doubted.to_numpy()}
    )
    return table.sort_values("suspects", ascending=False, kind="stable", ignore_index=True)
