"""Measure how accurate v5, v6 and v7 are, in what time, and v7 beside the usual script.

    python benchmarks/accuracy.py --data DIR

- v5, v5 with v6's backbone and size, v6, v7 and v7 with fewer epochs, one after the other, each as
  `har run` with an empty cache;
- the transfer learning of Keras' guide: train a head on the frozen network, with random flips and
  rotations, then all layers at a low rate. It gets v7's network, weights, image size, training
  images and wall time, half of it for each part;
- v6 and v7 on other splits.

Accuracies are on the test split, of which nothing is chosen. Differences are of paired predictions.
"""

import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

import measuring
from har.data.manifest import Manifest
from har.data.prepare import load_manifest
from har.recipe import VARIANTS
from har.util.progress import say
from measuring import Claim, Tables

# v5 with the backbone and the size of v6: bounds of time are multiples of its.
BASE = ("v5", "--backbone", VARIANTS["v6"].backbone, "--image-size", str(VARIANTS["v6"].image_size))
MAX_TIMES = {"v6": 2.5, "v7": 12.0}
LEAST = {"v6": (0.74, 0.92), "v7": (0.78, 0.935)}
# v7 in about half its time.
SHORT = ("v7", "--feature-views", "5", "--epochs", "5")
OTHER_SEEDS = {"v6": (1, 2), "v7": (1,)}
METRICS = ("accuracy", "top_3_accuracy", "macro_f1", "calibration_error")
# The guide's rates: of the head, and of all layers.
HEAD_RATE, TUNING_RATE = 1e-3, 1e-5
GUIDE = "Keras' guide"


def _load(manifest: Manifest, split: str, size: int) -> Any:
    """Build batches of (images, label ids) in the plain way of TensorFlow."""
    import tensorflow as tf

    rows = manifest.rows(split)
    paths = [str(manifest.root / path) for path in rows["path"]]
    pairs = tf.data.Dataset.from_tensor_slices((paths, rows["label_id"].to_numpy()))
    if split == "train":
        pairs = pairs.shuffle(len(paths), seed=0)

    def decode(path: Any, label: Any) -> Any:
        image = tf.io.decode_image(tf.io.read_file(path), 3, expand_animations=False)
        return tf.image.resize(image, (size, size)), label

    return pairs.map(decode, tf.data.AUTOTUNE).batch(32).prefetch(tf.data.AUTOTUNE)


def _train_as_the_guide(manifest: Manifest, budget_s: float) -> dict[str, Any]:
    """Train as Keras' transfer-learning guide teaches, in `budget_s` seconds; return whether each
    test image is classified rightly, by path, and the epochs of both parts.
    """
    import keras
    from keras import layers

    from har.models.efficientnet_lite import build_imagenet_lite

    size, started, epochs = VARIANTS["v7"].image_size, time.monotonic(), []
    keras.utils.set_random_seed(0)
    base = build_imagenet_lite(VARIANTS["v7"].backbone, size)
    inputs = keras.Input((size, size, 3))
    x = layers.RandomRotation(0.1)(layers.RandomFlip("horizontal")(inputs))
    x = layers.Dropout(0.2)(base(x, training=False))
    outputs = layers.Dense(len(manifest.class_names), activation="softmax")(x)
    model, train = keras.Model(inputs, outputs), _load(manifest, "train", size)
    for rate, until in ((HEAD_RATE, started + budget_s / 2), (TUNING_RATE, started + budget_s)):
        base.trainable = rate == TUNING_RATE
        model.compile(keras.optimizers.Adam(rate), "sparse_categorical_crossentropy")
        stop = _StopAt(until)
        history = model.fit(train, epochs=1000, callbacks=[stop.callback()], verbose=0)
        epochs.append(len(history.epoch) - 1 + stop.share)
    predicted, rows = model.predict(_load(manifest, "test", size), verbose=0), manifest.rows("test")
    order = np.argsort(-predicted, axis=1)
    labels = rows["label_id"].to_numpy()[:, None]
    return {
        "hits": dict(zip(rows["path"], (order[:, 0] == labels[:, 0]).tolist(), strict=True)),
        "top_3_accuracy": float((order[:, :3] == labels).any(axis=1).mean()),
        "seconds": time.monotonic() - started,
        "epochs": " + ".join(f"{each:.1f}" for each in epochs),
    }


class _StopAt:
    """Ends a `fit` at a time, also within an epoch, of which `share` was then done."""

    def __init__(self, until: float) -> None:
        self.until, self.share = until, 0.0

    def callback(self) -> Any:
        import keras

        def check(batch: int, logs: Any) -> None:
            model, steps = found.model, found.params["steps"]
            self.share = (batch + 1) / steps if steps else 1.0
            if time.monotonic() >= self.until:
                model.stop_training = True

        found = keras.callbacks.LambdaCallback(on_train_batch_end=check)
        return found


def _read_hits(folder: Path, run_id: str) -> tuple[dict[str, bool], dict[str, float]]:
    """Read from a run whether each test image is classified rightly, and the recall by class."""
    import mlflow
    import pandas as pd

    mlflow.set_tracking_uri(measuring.store_in(folder)["MLFLOW_TRACKING_URI"])
    tables = [
        pd.read_csv(mlflow.artifacts.download_artifacts(f"runs:/{run_id}/evaluation/{name}.csv"))
        for name in ("predictions", "per_class")
    ]
    predictions, by_class = tables
    right = predictions["label"] == predictions["predicted"]
    recalls = dict(zip(by_class["label"], by_class["recall"], strict=True))
    return dict(zip(predictions["path"], right, strict=True)), recalls


def _describe(name: str, run: dict[str, Any]) -> dict[str, Any]:
    """Return a table's row of one run."""
    interval = f"({100 * run['accuracy_low']:.1f} to {100 * run['accuracy_high']:.1f})"
    row: dict[str, Any] = {"name": name, "accuracy, %": f"{100 * run['accuracy']:.1f} {interval}"}
    row |= {each: f"{run[each]:.3f}" for each in METRICS[1:]}
    features = run.get("extraction_time_s", 0.0)
    return row | {
        "features, s": features,
        "fit, s": run["train_time_s"] - features,
        "all, s": run["wall_time_s"],
        "megabytes": run["peak_memory_mb"],
        "ms an image": run["latency_ms"],
    }


def _compare(name: str, hits: dict[str, bool], others: dict[str, bool]) -> dict[str, Any]:
    """Return a table's row of a paired difference, in points."""
    from har.evaluation.metrics import paired_difference, paired_test

    paths = sorted(hits)
    one, other = (np.array([each[path] for path in paths]) for each in (hits, others))
    points = [100 * each for each in paired_difference(other, one)]
    *_, p_value = paired_test(other, one)
    return {"name": name, "points": points[0], "low": points[1], "high": points[2], "p": p_value}


def _claim_bars(runs: dict[str, dict[str, Any]], compared: list[dict[str, Any]]) -> list[Claim]:
    claims = []
    base_s = runs["v5 of v6's size"]["wall_time_s"]
    for name, (accuracy, top_3) in LEAST.items():
        run = runs[name]
        claims += [
            Claim(f"{name}: accuracy", run["accuracy"], ">=", accuracy),
            Claim(f"{name}: top-3 accuracy", run["top_3_accuracy"], ">=", top_3),
            Claim(f"{name}: time / v5's", run["wall_time_s"] / base_s, "<=", MAX_TIMES[name]),
        ]
    return claims + [
        Claim(f"{each['name']}: lower end, points", each["low"], ">=", 0) for each in compared
    ]


def measure(data: str, scratch: Path, tiny: bool) -> tuple[Tables, list[Claim]]:
    """Run every training, compare v7 with the guide's script and v6, and train on other splits."""
    small = ("--image-size", "64", "--epochs", "2") if tiny else ()
    words = {"v5": ("v5",), "v5 of v6's size": BASE, "v6": ("v6",), "v7": ("v7",),
             "v7, five epochs": SHORT}  # fmt: skip
    runs = {
        name: measuring.har_run(variant, data, scratch / name, *options, *small)
        for name, (variant, *options) in words.items()
    }
    hits, recalls = {}, {}
    for name, run in runs.items():
        hits[name], recalls[name] = _read_hits(scratch / name, run["run_id"])
    say("the script of Keras' guide")
    manifest = load_manifest(data)
    budget_s = 20 if tiny else runs["v7"]["wall_time_s"]
    guide = measuring.in_fresh_process(_train_as_the_guide, manifest, budget_s)
    share = statistics.mean(guide["hits"].values())
    row = {"name": f"{GUIDE}, {guide['epochs']} epochs", "accuracy, %": f"{100 * share:.1f}",
           "top_3_accuracy": f"{guide['top_3_accuracy']:.3f}",
           "all, s": guide["seconds"]}  # fmt: skip
    compared = [
        _compare("v7 - guide", hits["v7"], guide["hits"]),
        _compare("v7 - v6", hits["v7"], hits["v6"]),
        _compare("v7, five epochs - v6", hits["v7, five epochs"], hits["v6"]),
    ]
    splits = [
        _describe(f"{name}, seed {seed}", measuring.har_run(
            name, data, scratch / f"{name} {seed}", "--split-seed", str(seed), *small))
        for name, seeds in OTHER_SEEDS.items() for seed in seeds
    ]  # fmt: skip
    by_class = [
        {"name": label} | {name: f"{recalls[name][label]:.2f}" for name in recalls}
        for label in recalls["v5"]
    ]
    tables = {
        "one after the other": [*(_describe(*each) for each in runs.items()), row],
        "paired difference": compared,
        "other splits": splits,
        "recall": by_class,
    }
    return tables, [] if tiny else _claim_bars(runs, compared)


if __name__ == "__main__":
    measuring.run(__file__, __doc__, measure)
