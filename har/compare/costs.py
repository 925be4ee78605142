"""What a training costs: its time, split into what each image costs and the rest."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from har.tracking.records import Record, find_hits_by_path


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Time and accuracy of one recipe: medians over its seeds, and the hits of each seed."""

    epochs: float
    epoch_s: float
    images: float  # training images of all epochs
    image_s: float  # time of one of them, with its share of validation
    rest_s: float  # wall time outside of fit
    wall_s: float
    accuracy: float | None
    hits: npt.NDArray[np.bool_] | None  # (seeds, images)


def measure_cost(records: Sequence[Record]) -> Cost:
    """Measure the trainings of one recipe, which differ only in their seeds."""
    rows = [_measure_training(each) for each in records]
    medians = {name: float(np.median([row[name] for row in rows])) for name in rows[0]}
    predictions = [each.predictions for each in records if each.predictions is not None]
    if len(predictions) < len(records):
        return Cost(**medians, accuracy=None, hits=None)
    accuracies = [each.accuracy for each in records if each.accuracy is not None]
    hits = np.stack([find_hits_by_path(each).to_numpy() for each in predictions])
    return Cost(**medians, accuracy=float(np.mean(accuracies)), hits=hits)


def _measure_training(record: Record) -> dict[str, float]:
    """Numbers of one training. Features from the cache count with the time of computing them."""
    epoch_times = [epoch["epoch_time_s"] for epoch in record.history]
    wall_s, fit_s = (record.seconds or 0.0) + record.saved_s, sum(epoch_times)
    images = len(epoch_times) * record.epoch_images
    return {
        "epochs": len(epoch_times),
        "epoch_s": float(np.median(epoch_times)),
        "images": images,
        "image_s": fit_s / images,
        "rest_s": wall_s - fit_s,
        "wall_s": wall_s,
    }


def split_difference(before: Cost, after: Cost) -> dict[str, float]:
    """Return the seconds of wall time that each cause adds or (negative) saves; they add up to all.

    Each factor changes at the mean of the other factor: this leaves no remainder, and does not
    depend on an order.
    """
    return {
        "time an image": (after.image_s - before.image_s) * (after.images + before.images) / 2,
        "number of images": (after.images - before.images) * (after.image_s + before.image_s) / 2,
        "before and after fit": after.rest_s - before.rest_s,
    }
