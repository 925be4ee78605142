"""Numbers about predictions: pure functions of NumPy arrays.

Throughout: `probabilities` is (images, classes) float, rows summing to 1;
`label_ids` is (images,) int, the true classes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest, norm
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

Floats = npt.NDArray[np.floating]
Ints = npt.NDArray[np.integer]
Bools = npt.NDArray[np.bool_]


def top_k_hits(probabilities: Floats, label_ids: Ints, k: int) -> Bools:
    """(images,) whether the true class is among the k most probable; ties: lower id first."""
    best = np.argsort(-probabilities, axis=1, kind="stable")[:, :k]
    hits: Bools = (best == label_ids[:, None]).any(axis=1)
    return hits


def wilson_interval(successes: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """`wilson_intervals` of a single proportion."""
    low, high = wilson_intervals(np.array([successes]), np.array([total]), confidence)
    return float(low[0]), float(high[0])


def wilson_intervals(
    successes: Ints, totals: Ints, confidence: float = 0.95
) -> tuple[Floats, Floats]:
    """Wilson's score interval for each proportion (Wilson 1927, without continuity correction).

    Holds near 0 and 1 and for few images, where the normal approximation does not. Out of
    nothing (a total of 0) nothing is known: 0 to 1.
    """
    z = norm.ppf((1 + confidence) / 2)
    n = np.maximum(totals, 1)
    share = successes / n
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    # rounding must not push an end past the share itself, nor past 0 or 1
    low = np.clip(centre - half, 0, share)
    high = np.clip(centre + half, share, 1)
    return np.where(totals > 0, low, 0.0), np.where(totals > 0, high, 1.0)


def paired_difference(before: Bools, after: Bools) -> tuple[float, float, float]:
    """Share of `after` minus share of `before`, with its 95 % interval (low, high).

    Both are (images,) hits on the same images in the same order, so that only the images
    on which they differ count. The interval is Wald's after one image was added to either
    kind of difference (Bonett and Price 2012, Journal of Educational and Behavioral
    Statistics 37; recommended by Fagerland and others 2014, Statistics in Medicine 33): it
    keeps its width where few or no images differ, where Wald's shrinks to nothing.
    """
    images = len(before)
    gained, lost = int((after & ~before).sum()), int((before & ~after).sum())
    plus, minus = (gained + 1) / (images + 2), (lost + 1) / (images + 2)
    half = norm.ppf(0.975) * np.sqrt((plus + minus - (plus - minus) ** 2) / (images + 2))
    low, high = np.clip([plus - minus - half, plus - minus + half], -1, 1)
    return (gained - lost) / images, float(low), float(high)


def in_points(difference: tuple[float, float, float]) -> str:
    """A difference of shares with its interval, in percentage points: `+0.8 (-1.3 to +2.9)`."""
    value, low, high = (f"{100 * each:+.1f}" for each in difference)
    return f"{value} ({low} to {high})"


def mean_paired_difference(before: Bools, after: Bools) -> tuple[float, float, float]:
    """`paired_difference` of several trainings: (seeds, images) hits each, with equal images.

    Of each image first the share of seeds that are right on it: the interval says how the mean
    over these seeds would vary with the images, by the normal approximation; nothing of how it
    would vary with other seeds. One seed on each side: `paired_difference`.
    """
    if len(before) == len(after) == 1:
        return paired_difference(before[0], after[0])
    by_image = after.mean(axis=0) - before.mean(axis=0)
    mean = float(by_image.mean())
    half = float(norm.ppf(0.975) * by_image.std(ddof=1) / np.sqrt(len(by_image)))
    return mean, max(-1.0, mean - half), min(1.0, mean + half)


def paired_test(before: Bools, after: Bools) -> tuple[int, int, float]:
    """Images that only `after`, and that only `before`, has right; and McNemar's exact p-value.

    Both are (images,) hits on the same images in the same order. If neither is better, each
    image on which they differ falls to either side as a coin does (McNemar 1947): the p-value
    is how likely the coin is at least as uneven, to either side; 1 where they never differ.
    """
    gained, lost = int((after & ~before).sum()), int((before & ~after).sum())
    return gained, lost, _two_sided_p(gained, gained + lost)


# many pairs of runs share few counts
@cache
def _two_sided_p(heads: int, throws: int) -> float:
    """How likely a fair coin falls at least as unevenly; 1 without throws."""
    return float(binomtest(heads, throws).pvalue) if throws else 1.0


def correct_for_many(p_values: Floats) -> Floats:
    """(tests,) p-values such that, if no difference is real, the chance that even one falls below
    a level is at most that level, however the tests depend on each other (Holm 1979).
    """
    tests = len(p_values)
    order = np.argsort(p_values, kind="stable")
    stepped = np.maximum.accumulate(p_values[order] * np.arange(tests, 0, -1))
    corrected = np.empty(tests)
    corrected[order] = np.minimum(stepped, 1.0)
    return corrected


def log_loss(probabilities: Floats, label_ids: Ints) -> float:
    """Mean negative log likelihood in nats; 0 is perfect, ln(classes) is guessing."""
    chosen = probabilities[np.arange(len(label_ids)), label_ids].astype(np.float64)
    # float32's smallest step from 0, so that one hopeless image cannot make it infinite
    return float(-np.log(np.clip(chosen, np.finfo(np.float32).tiny, 1.0)).mean())


def reliability(
    probabilities: Floats, label_ids: Ints, bins: int = 15
) -> dict[str, npt.NDArray[Any]]:
    """How often a confidence is right: (bins,) arrays over equal-width bins of confidence.

    confidence_from, confidence_to: the bin's ends; confidence: mean probability of the
    predicted class; accuracy, accuracy_low, accuracy_high: with a 95 % Wilson interval;
    images. A bin without images has NaN for confidence and accuracy, and 0 to 1.
    """
    confidence = probabilities.max(axis=1)
    hits = top_k_hits(probabilities, label_ids, 1)
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    images = np.bincount(which, minlength=bins)
    right = np.bincount(which[hits], minlength=bins)
    low, high = wilson_intervals(right, images)
    edges = np.linspace(0, 1, bins + 1)
    some = np.where(images > 0, images, np.nan)
    return {
        "confidence_from": edges[:-1],
        "confidence_to": edges[1:],
        "confidence": np.bincount(which, confidence, minlength=bins) / some,
        "accuracy": right / some,
        "accuracy_low": low,
        "accuracy_high": high,
        "images": images,
    }


def calibration_error(probabilities: Floats, label_ids: Ints, bins: int = 15) -> float:
    """Expected calibration error: |confidence - accuracy| over the bins of `reliability`,
    weighted by images (Guo et al. 2017). 0: says 70 %, is right in 70 %.
    """
    found = reliability(probabilities, label_ids, bins)
    gap = np.abs(found["confidence"] - found["accuracy"])
    return float(np.nansum(found["images"] * gap) / len(label_ids))


def class_scores(probabilities: Floats, label_ids: Ints) -> dict[str, npt.NDArray[Any]]:
    """(classes,) arrays: precision, recall, f1 (0 where undefined) and images.

    recall_low and recall_high are recall's 95 % Wilson interval, 0 to 1 for a class without
    images.
    """
    precision, recall, f1, images = precision_recall_fscore_support(
        label_ids,
        predicted_ids(probabilities),
        labels=np.arange(probabilities.shape[1]),
        zero_division=0.0,
    )
    low, high = wilson_intervals(confusion(probabilities, label_ids).diagonal(), images)
    return {
        "precision": precision,
        "recall": recall,
        "recall_low": low,
        "recall_high": high,
        "f1": f1,
        "images": images,
    }


def confusion(probabilities: Floats, label_ids: Ints) -> npt.NDArray[np.int64]:
    """(classes, classes) counts; rows are the true classes, columns the predicted ones."""
    counts: npt.NDArray[np.int64] = confusion_matrix(
        label_ids, predicted_ids(probabilities), labels=np.arange(probabilities.shape[1])
    )
    return counts


def predicted_ids(probabilities: Floats) -> npt.NDArray[np.int64]:
    """(images,) the most probable class of each; ties: the lower id."""
    return probabilities.argmax(axis=1)


def top_k_accuracy(probabilities: Floats, label_ids: Ints, k: int = 1) -> float:
    """Share of images whose true class is among the k most probable."""
    return float(top_k_hits(probabilities, label_ids, k).mean())


def accuracy_interval(probabilities: Floats, label_ids: Ints) -> tuple[float, float]:
    """Ends (low, high) of the 95 % Wilson interval of the accuracy."""
    hits = top_k_hits(probabilities, label_ids, 1)
    return wilson_interval(int(hits.sum()), len(hits))


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A number of one model on the test split.

    `compute` maps (probabilities, label_ids) to it; tables show it under `heading`, in `form`, a
    format specification. `in_view`: it is a column of the saved view of the MLflow UI, which has
    room for a few.
    """

    compute: Callable[[Floats, Ints], float]
    heading: str
    form: str = ".1%"
    in_view: bool = True


# Metrics of the test split by the names they are logged under, in the order that tables show:
# each is logged into every run, printed by `har evaluate`, and a column of the comparison and,
# unless it says otherwise, of the saved view of the MLflow UI.
TEST_METRICS: dict[str, Metric] = {
    "accuracy": Metric(compute=top_k_accuracy, heading="test accuracy"),
    "accuracy_low": Metric(compute=lambda p, ids: accuracy_interval(p, ids)[0], heading="from"),
    "accuracy_high": Metric(compute=lambda p, ids: accuracy_interval(p, ids)[1], heading="to"),
    "top_3_accuracy": Metric(compute=partial(top_k_accuracy, k=3), heading="top-3"),
    "macro_f1": Metric(
        compute=lambda p, ids: float(class_scores(p, ids)["f1"].mean()),
        heading="macro F1",
        in_view=False,
    ),
    "log_loss": Metric(compute=log_loss, heading="log loss", form=".3f", in_view=False),
    "calibration_error": Metric(
        compute=calibration_error, heading="calibration error", in_view=False
    ),
}


def score(probabilities: Floats, label_ids: Ints) -> dict[str, float]:
    """Every metric of TEST_METRICS by its name."""
    return {name: each.compute(probabilities, label_ids) for name, each in TEST_METRICS.items()}
