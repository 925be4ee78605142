"""`audit(job)` finds the images whose label a linear probe doubts, without the test split;
`leave_out_suspects` takes them out of a training.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import keras
import numpy as np
import numpy.typing as npt
import pandas as pd

from har.inference.freezing import compute_float32_in_full
from har.models.backbones import build_backbone
from har.models.devices import make_deterministic
from har.training.bad_images import name_bad_images
from har.training.feature_cache import Features, check_limit
from har.training.features import View, evaluation_views
from har.training.job import TrainingJob
from har.training.loaders import Splits, check_batch, check_feature_memory
from har.training.probe import (
    FoldedData,
    OutOfFold,
    apply_root,
    assign_folds,
    count_folds,
    cross_validate,
)
from har.training.ray_features import open_extraction
from har.training.suspects import check_cleanlab, find_suspects, suggest_labels
from har.util.errors import UserError
from har.util.progress import say
from har.util.signals import defer_interrupts

# Digits of a probability in the table.
DIGITS = 4
# Folds by which a training finds its suspects, unless its head is solved for by folds of its own.
NUM_FOLDS = 5


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
    make_repeatable(recipe.seed)
    folds = assign_folds(rows, count_folds(recipe), recipe.seed)
    with name_bad_images(job.manifest):
        found = _predict(job, rows, evaluation_views(recipe), folds)
    suspects = tabulate_suspects(rows, found.probabilities, job.manifest.class_names)
    right = found.probabilities.argmax(axis=1) == rows["label_id"].to_numpy()
    return Audit(
        suspects=suspects,
        by_class=_count_by_class(rows, suspects),
        images=len(rows),
        folds=int(folds.max()) + 1,
        accuracy=float(right.mean()),
    )


def make_repeatable(seed: int) -> None:
    """Make all numbers that follow depend on the seed alone, as far as the hardware allows."""
    make_deterministic()
    compute_float32_in_full()
    keras.utils.set_random_seed(seed)


def leave_out_suspects(job: TrainingJob, splits: Splits) -> Splits:
    """Return the splits without the training images whose label a linear probe doubts, if the
    recipe asks for it. The probe knows no other images, and predicts each from the backbone's
    features of the image as it is. A head that is solved for leaves out its own.

    Raises:
        UserError: as `audit`, or fewer images remain than a batch has.
    """
    rows, recipe = splits.train, job.used
    if recipe.suspects == "keep" or recipe.solved:
        return splits
    folds = assign_folds(rows, NUM_FOLDS, recipe.seed)
    found = _predict(job, rows, [View(size=recipe.image_size)], folds)
    kept = ~find_suspects(found.probabilities, rows["label_id"].to_numpy())
    say(f"without {int((~kept).sum()):,} of {len(rows):,} suspects")
    check_batch(int(kept.sum()), recipe)
    return Splits(train=rows[kept].reset_index(drop=True), validation=splits.validation)


def _predict(
    job: TrainingJob, rows: pd.DataFrame, views: Sequence[View], folds: npt.NDArray[np.int64]
) -> OutOfFold:
    """Predict each row out of fold by a linear probe on the features of the views."""
    features, labels = apply_root(_extract(job, rows, views)), rows["label_id"].to_numpy()
    classes = len(job.manifest.class_names)
    with defer_interrupts() as checkpoint:
        data = FoldedData(
            train=features,
            evaluated=features,
            labels=labels,
            folds=folds,
            classes=classes,
            recipe=job.used,
        )
        return cross_validate(data, checkpoint)


def _extract(job: TrainingJob, rows: pd.DataFrame, views: Sequence[View]) -> Features:
    """Compute or read the (views, rows, features) of the pretrained backbone."""
    backbone = build_backbone(replace(job.used, precision="float32"))
    with open_extraction(job, backbone) as extraction:
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
