"""Trainings as read back from a store, that the tests of this package vary."""

from dataclasses import asdict, replace
from typing import Any

import pandas as pd

from har.recipe import VARIANTS
from har.tracking.records import Record

HERE = Record(
    run_id="here",
    name="v3 · lite0 · 1xP100",
    variant="v3",
    differs_from_variant="none",
    hardware="1xP100",
    published=False,
    cache_hit=False,
    started=1,
    digests=("r", "d", "t"),
    precision="float32",
    strategy="mirrored",
    backbone="efficientnet-lite0",
    dataset="images",
    split=None,
    runtime="auto",
    feature_runtime=None,
    seconds=200.0,
    saved_s=0.0,
    images_per_second=100.0,
    memory_mb=None,
    test_metrics={
        "accuracy": 0.5,
        "accuracy_low": 0.4,
        "accuracy_high": 0.6,
        "top_3_accuracy": 0.8,
    },
    val_accuracy=None,
    train_accuracy=None,
    train_images=64,
)
HOSTILE = "_<script>alert(1)</script>$^$"
PATHS = [f"train/Image_{number}.jpg" for number in range(40)]


def record(run_id: str, right: int = 20, **fields: Any) -> Record:
    """A run that is right on the first `right` of 40 images of two classes."""
    labels = ["eating", HOSTILE] * 20
    said = [
        label if number < right else "eating" if label == HOSTILE else HOSTILE
        for number, label in enumerate(labels)
    ]
    accuracy = right / len(labels)
    epoch = {"train_accuracy": 0.1, "val_accuracy": 0.2, "epoch_time_s": 3.0}
    return replace(
        HERE,
        run_id=run_id,
        test_metrics={
            "accuracy": accuracy,
            "accuracy_low": accuracy - 0.1,
            "accuracy_high": accuracy + 0.1,
        },
        recipe=asdict(VARIANTS["v3"]),
        history=[epoch, {**epoch, "epoch_time_s": 5.0}],
        predictions=pd.DataFrame({"path": PATHS, "label": labels, "predicted": said}),
        **fields,
    )


PUBLISHED = replace(
    HERE,
    run_id="published",
    published=True,
    test_metrics={},
    digests=("", "", ""),
    recipe=asdict(VARIANTS["v4"]),
)
