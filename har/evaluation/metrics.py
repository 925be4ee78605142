"""Metrics and statistical tests of predictions: pure functions of NumPy arrays.

In all functions, `probabilities` is (images, classes) float whose rows sum to 1, and `label_ids`
is (images,) int, the true classes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]
Ints = npt.NDArray[np.integer]
Bools = npt.NDArray[np.bool_]
# Half the width of a 95 % interval, in standard errors.
Z_95 = NormalDist().inv_cdf(0.975)


def top_k_hits(probabilities: Floats, label_ids: Ints, k: int) -> Bools:
    """Return (images,) True if the true class is among the k most probable; ties: lower id."""
    of_label = probabilities[np.arange(len(label_ids)), label_ids][:, None]
    lower_ids = np.arange(probabilities.shape[1]) < label_ids[:, None]
    better = (probabilities > of_label) | ((probabilities == of_label) & lower_ids)
    hits: Bools = better.sum(axis=1) < k
    return hits


def wilson_interval(successes: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the `wilson_intervals` of one proportion."""
    low, high = wilson_intervals(np.array([successes]), np.array([total]), confidence)
    return float(low[0]), float(high[0])


def wilson_intervals(
    successes: Ints, totals: Ints, confidence: float = 0.95
) -> tuple[Floats, Floats]:
    """Return Wilson's score interval of each proportion (Wilson 1927, no continuity correction).

    Unlike the normal approximation, it is right near 0 and 1 and for few images. For a total of
    0, it is 0 to 1.
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    n = np.maximum(totals, 1)
    share = successes / n
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    # rounding must not move an end past the share itself, or past 0 or 1
    low = np.clip(centre - half, 0, share)
    high = np.clip(centre + half, share, 1)
    return np.where(totals > 0, low, 0.0), np.where(totals > 0, high, 1.0)


def paired_difference(before: Bools, after: Bools) -> tuple[float, float, float]:
    """Return accuracy of `after` minus accuracy of `before`, with its 95 % interval (low, high).

    Both are (images,) hits on the same images in the same order: only images on which they differ
    count. This is Wald's interval after adding one image to each kind of difference (Bonett and
    Price 2012, Journal of Educational and Behavioral Statistics 37; recommended by Fagerland and
    others 2014, Statistics in Medicine 33). It keeps its width if few or no images differ, where
    Wald's shrinks to nothing.
    """
    images = len(before)
    gained, lost = _count_changes(before, after)
    plus, minus = (gained + 1) / (images + 2), (lost + 1) / (images + 2)
    half = Z_95 * np.sqrt((plus + minus - (plus - minus) ** 2) / (images + 2))
    low, high = np.clip([plus - minus - half, plus - minus + half], -1, 1)
    return (gained - lost) / images, float(low), float(high)


def _count_changes(before: Bools, after: Bools) -> tuple[int, int]:
    """Images on which only `after` is right, and on which only `before` is right."""
    return int((after & ~before).sum()), int((before & ~after).sum())


def in_points(difference: tuple[float, float, float]) -> str:
    """Format a difference with its interval in percentage points: `+0.8 (-1.3 to +2.9)`."""
    value, low, high = (f"{100 * each:+.1f}" for each in difference)
    return f"{value} ({low} to {high})"


def mean_paired_difference(before: Bools, after: Bools) -> tuple[float, float, float]:
    """Return the `paired_difference` of several trainings: hits are (seeds, images).

    The difference of an image is the difference of the shares of seeds that are right on it. The
    interval, by the normal approximation, says how the mean over these seeds varies with the
    images; it does not say how it varies with the seeds.
    """
    if len(before) == len(after) == 1:
        return paired_difference(before[0], after[0])
    by_image = after.mean(axis=0) - before.mean(axis=0)
    mean = float(by_image.mean())
    half = float(Z_95 * by_image.std(ddof=1) / np.sqrt(len(by_image)))
    return mean, max(-1.0, mean - half), min(1.0, mean + half)


def paired_test(before: Bools, after: Bools) -> tuple[int, int, float]:
    """Return how many images only `after` has right, how many only `before`, and McNemar's exact
    two-sided p-value (McNemar 1947); the p-value is 1 if they never differ.

    Both are (images,) hits on the same images in the same order.
    """
    gained, lost = _count_changes(before, after)
    return gained, lost, _two_sided_p(gained, gained + lost)


# cached, because many pairs of runs have the same few counts
@cache
def _two_sided_p(heads: int, throws: int) -> float:
    """The probability that a fair coin falls at least as unevenly."""
    # loads for half a second
    from scipy.stats import binomtest

    return float(binomtest(heads, throws).pvalue) if throws else 1.0


def correct_for_many(p_values: Floats) -> Floats:
    """Correct (tests,) p-values for the number of tests by Holm's method (Holm 1979).

    If no difference is real, the probability of any corrected value below a level is at most that
    level, also for tests that depend on each other.
    """
    tests = len(p_values)
    order = np.argsort(p_values, kind="stable")
    stepped = np.maximum.accumulate(p_values[order] * np.arange(tests, 0, -1))
    corrected = np.empty(tests)
    corrected[order] = np.minimum(stepped, 1.0)
    return corrected


def log_loss(probabilities: Floats, label_ids: Ints) -> float:
    """Return the mean negative log-likelihood in nats; 0 is perfect, ln(classes) is guessing."""
    chosen = probabilities[np.arange(len(label_ids)), label_ids].astype(np.float64)
    # clip at float32's smallest number, so that one image cannot make the mean infinite
    return float(-np.log(np.clip(chosen, np.finfo(np.float32).tiny, 1.0)).mean())


def reliability(
    probabilities: Floats, label_ids: Ints, bins: int = 15
) -> dict[str, npt.NDArray[Any]]:
    """Return (bins,) arrays that compare confidence and accuracy in bins of equal width."""
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
        # the mean; this and the accuracy are NaN for a bin without images
        "confidence": np.bincount(which, confidence, minlength=bins) / some,
        "accuracy": right / some,
        "accuracy_low": low,  # ends of the 95 % Wilson interval
        "accuracy_high": high,
        "images": images,
    }


def calibration_error(probabilities: Floats, label_ids: Ints, bins: int = 15) -> float:
    """Return the expected calibration error (Guo et al. 2017), with `reliability`'s bins."""
    found = reliability(probabilities, label_ids, bins)
    gap = np.abs(found["confidence"] - found["accuracy"])
    return float(np.nansum(found["images"] * gap) / len(label_ids))


def class_scores(probabilities: Floats, label_ids: Ints) -> dict[str, npt.NDArray[Any]]:
    """Return (classes,) arrays: precision, recall, recall_low, recall_high, f1 and images.

    A score without images is 0, and the 95 % Wilson interval of its recall is 0 to 1.
    """
    # loads for a quarter of a second
    from sklearn.metrics import precision_recall_fscore_support

    precision, recall, f1, images = precision_recall_fscore_support(
        label_ids,
        predicted_ids(probabilities),
        labels=np.arange(probabilities.shape[1]),
        zero_division=0.0,
    )
    hits = top_k_hits(probabilities, label_ids, 1)
    right = np.bincount(label_ids[hits], minlength=probabilities.shape[1])
    low, high = wilson_intervals(right, images)
    return {
        "precision": precision,
        "recall": recall,
        "recall_low": low,
        "recall_high": high,
        "f1": f1,
        "images": images,
    }


def confusion(probabilities: Floats, label_ids: Ints) -> npt.NDArray[np.int64]:
    """Return one row for each pair of classes that has images: the true class' id, the predicted
    class' id, and the number of images; sorted by both ids.

    A whole matrix of 30,000 classes would need 7 GB.
    """
    pairs = np.column_stack([label_ids, predicted_ids(probabilities)])
    found, counts = np.unique(pairs, axis=0, return_counts=True)
    return np.column_stack([found, counts]).astype(np.int64)


def most_confused(pairs: npt.NDArray[np.int64], classes: int, most: int) -> Ints:
    """Return the ids, ascending, of at most `most` of `classes` classes: those of the pairs that
    are confused most often. `pairs` is that of `confusion`.

    Places that are left over go to the classes with the lowest ids.
    """
    wrong = pairs[pairs[:, 0] != pairs[:, 1]]
    by_count = wrong[np.argsort(-wrong[:, 2], kind="stable"), :2]
    # a dict keeps the order and drops repeats
    ids = dict.fromkeys([*by_count.ravel().tolist(), *range(min(classes, most))])
    return np.sort(np.array(list(ids)[:most], dtype=np.int64))


def predicted_ids(probabilities: Floats) -> npt.NDArray[np.int64]:
    """Return (images,) the id of the most probable class; ties: lower id."""
    return probabilities.argmax(axis=1)


def _top_k_accuracy(probabilities: Floats, label_ids: Ints, k: int = 1) -> float:
    return float(top_k_hits(probabilities, label_ids, k).mean())


def _accuracy_interval(probabilities: Floats, label_ids: Ints) -> tuple[float, float]:
    hits = top_k_hits(probabilities, label_ids, 1)
    return wilson_interval(int(hits.sum()), len(hits))


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A metric of one model on the test split."""

    compute: Callable[[Floats, Ints], float]  # from (probabilities, label_ids)
    heading: str  # in tables
    form: str = ".1%"  # number format in tables
    in_view: bool = True  # a column of the saved view of the MLflow UI


# The metrics of the test split by the names under which they are logged, in the order of tables.
# Every run logs them, and `har evaluate` and the comparison show them.
TEST_METRICS: dict[str, Metric] = {
    "accuracy": Metric(compute=_top_k_accuracy, heading="test accuracy"),
    "accuracy_low": Metric(compute=lambda p, ids: _accuracy_interval(p, ids)[0], heading="from"),
    "accuracy_high": Metric(compute=lambda p, ids: _accuracy_interval(p, ids)[1], heading="to"),
    "top_3_accuracy": Metric(compute=partial(_top_k_accuracy, k=3), heading="top-3"),
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
    """Compute the metrics of TEST_METRICS by name."""
    return {name: each.compute(probabilities, label_ids) for name, each in TEST_METRICS.items()}
