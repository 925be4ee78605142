"""Numbers about predictions: pure functions of NumPy arrays.

Throughout: `probabilities` is (images, classes) float, rows summing to 1;
`label_ids` is (images,) int, the true classes.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

Floats = npt.NDArray[np.floating]
Ints = npt.NDArray[np.integer]


def top_k_hits(probabilities: Floats, label_ids: Ints, k: int) -> npt.NDArray[np.bool_]:
    """(images,) whether the true class is among the k most probable; ties: lower id first."""
    best = np.argsort(-probabilities, axis=1, kind="stable")[:, :k]
    hits: npt.NDArray[np.bool_] = (best == label_ids[:, None]).any(axis=1)
    return hits


def wilson_interval(successes: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for a proportion (Wilson 1927, without continuity correction).

    Holds near 0 and 1 and for few images, where the normal approximation does not.
    """
    interval = binomtest(successes, total).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def log_loss(probabilities: Floats, label_ids: Ints) -> float:
    """Mean negative log likelihood in nats; 0 is perfect, ln(classes) is guessing."""
    chosen = probabilities[np.arange(len(label_ids)), label_ids].astype(np.float64)
    # float32's smallest step from 0, so that one hopeless image cannot make it infinite
    return float(-np.log(np.clip(chosen, np.finfo(np.float32).tiny, 1.0)).mean())


def calibration_error(probabilities: Floats, label_ids: Ints, bins: int = 15) -> float:
    """Expected calibration error: |confidence - accuracy| over equal-width bins of
    confidence, weighted by images (Guo et al. 2017). 0: says 70 %, is right in 70 %.
    """
    confidence = probabilities.max(axis=1)
    hits = top_k_hits(probabilities, label_ids, 1)
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    gap = np.bincount(which, confidence - hits, minlength=bins)
    return float(np.abs(gap).sum() / len(label_ids))


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Numbers of one model on one split; the field names are the logged metric names."""

    accuracy: float
    accuracy_low: float
    accuracy_high: float
    top_3_accuracy: float
    macro_f1: float
    log_loss: float
    calibration_error: float


def score(probabilities: Floats, label_ids: Ints) -> Scores:
    """Every scalar the project reports; `accuracy_low/high` is a 95 % Wilson interval."""
    hits = top_k_hits(probabilities, label_ids, 1)
    low, high = wilson_interval(int(hits.sum()), len(hits))
    per_class = class_scores(probabilities, label_ids)
    return Scores(
        accuracy=float(hits.mean()),
        accuracy_low=low,
        accuracy_high=high,
        top_3_accuracy=float(top_k_hits(probabilities, label_ids, 3).mean()),
        macro_f1=float(per_class["f1"].mean()),
        log_loss=log_loss(probabilities, label_ids),
        calibration_error=calibration_error(probabilities, label_ids),
    )


def class_scores(probabilities: Floats, label_ids: Ints) -> dict[str, npt.NDArray[np.float64]]:
    """(classes,) arrays: precision, recall, f1 (0 where undefined) and images."""
    precision, recall, f1, images = precision_recall_fscore_support(
        label_ids,
        predicted_ids(probabilities),
        labels=np.arange(probabilities.shape[1]),
        zero_division=0.0,
    )
    return {"precision": precision, "recall": recall, "f1": f1, "images": images}


def confusion(probabilities: Floats, label_ids: Ints) -> npt.NDArray[np.int64]:
    """(classes, classes) counts; rows are the true classes, columns the predicted ones."""
    counts: npt.NDArray[np.int64] = confusion_matrix(
        label_ids, predicted_ids(probabilities), labels=np.arange(probabilities.shape[1])
    )
    return counts


def predicted_ids(probabilities: Floats) -> npt.NDArray[np.int64]:
    """(images,) the most probable class of each; ties: the lower id."""
    return probabilities.argmax(axis=1)
